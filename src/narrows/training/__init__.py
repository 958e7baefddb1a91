"""Training with Lightning: one file per task, and the callbacks that write what a run leaves behind."""
