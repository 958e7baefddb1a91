"""A small language model as a GGUF file, as llama.cpp's converter writes it."""

from pathlib import Path

import numpy as np
import pytest

DIM, DEPTH, HIDDEN, VOCABULARY = 8, 2, 16, 101


def save_gguf(file: Path) -> Path:
    """A Llama of two layers with a vocabulary of bytes."""
    gguf = pytest.importorskip("gguf")
    random, writer = np.random.default_rng(0), gguf.GGUFWriter(file, "llama")
    writer.add_block_count(DEPTH)
    writer.add_context_length(64)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIM // 2)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(VOCABULARY)
    special, text = ["<s>", "</s>", "<unk>", "<pad>"], [*map(chr, range(33, 127)), "Ġ", "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*special, *text])
    writer.add_token_types([3] * len(special) + [1] * len(text))
    writer.add_token_merges(["a b", "c d"])
    for number, add in enumerate(
        (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id)
    ):
        add(number)
    shapes = {"token_embd": (VOCABULARY, DIM), "output_norm": (DIM,), "output": (VOCABULARY, DIM)}
    square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (DIM, DIM))
    layer = {**square, "ffn_gate": (HIDDEN, DIM), "ffn_up": (HIDDEN, DIM), "ffn_down": (DIM, HIDDEN)}
    for index in range(DEPTH):
        every = {**layer, "attn_norm": (DIM,), "ffn_norm": (DIM,)}
        shapes |= {f"blk.{index}.{name}": shape for name, shape in every.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
