"""Rows of a frozen language model's embeddings that train: those of tokens it has not seen before."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from narrows.errors import InvalidArgument


class TokenRows:
    """Some rows of a language model's input and output embeddings; their gradient is all that reaches the weights.

    An optimizer without weight decay leaves every other row as it is, to the bit.

    Args:
        language_model: of transformers.
        tokenizer: its tokenizer.
        tokens: whose rows.

    Raises:
        InvalidArgument: a token that tokenizer or language model does not have.
    """

    def __init__(self, language_model: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
        embeddings = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
        weights = [module.weight for module in embeddings if module is not None]
        # Tied embeddings are one weight.
        self.weights: list[nn.Parameter] = list({id(weight): weight for weight in weights}.values())
        vocabulary = tokenizer.get_vocab()
        unknown = [token for token in tokens if vocabulary.get(token, len(self.weights[0])) >= len(self.weights[0])]
        if unknown:
            raise InvalidArgument(
                "new_tokens",
                expected="tokens of the tokenizer, with rows in the language model's embeddings",
                got=repr(unknown[0]),
                hint="Add them first: tokenizer.add_tokens(...), resize_token_embeddings(...), and save both.",
            )
        self.ids = torch.tensor([vocabulary[token] for token in tokens])

    def train(self) -> None:
        """Let gradients reach these rows, and no other."""
        for weight in self.weights:
            weight.requires_grad_(True)
            weight.register_hook(self._of_rows)

    def state_dict(self) -> dict[str, Tensor]:
        """The rows, `[tokens, D]` of each weight."""
        return {f"embeddings.{index}": weight.detach()[self.ids] for index, weight in enumerate(self.weights)}

    @torch.no_grad()
    def load_state_dict(self, rows: dict[str, Tensor]) -> None:
        """Put the rows that `state_dict` gave in their place."""
        for index, weight in enumerate(self.weights):
            weight[self.ids] = rows[f"embeddings.{index}"].to(weight)

    def _of_rows(self, gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        ids = self.ids.to(gradient.device)
        return kept.index_copy(0, ids, gradient[ids])
