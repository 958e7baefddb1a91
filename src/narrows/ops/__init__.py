"""Mathematics on tensors: one folder per mechanism, without parameters and without state.

Each folder holds `reference.py`, the textbook form that is the specification; one file per fast form with the same
numbers; and `api.py`, the public function that validates and picks one.
"""
