"""A tokenizer made here: words are tokens."""

from collections.abc import Sequence
from typing import Any

from narrows.data.documents import END_OF_CHUNK, IMAGE


def word_tokenizer(words: Sequence[str], *, special: Sequence[str] = (IMAGE, END_OF_CHUNK), **options: Any) -> Any:
    """Splits at spaces; ids count `<pad>`, `<s>`, `special`, `words`. `begin=True` puts `<s>` before every text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", *special, "<unk>", *words]
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if options.pop("begin", False):
        tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    given = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)
