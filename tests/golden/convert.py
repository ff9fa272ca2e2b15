"""Compares what `caravan convert` reads and writes with the real thing: python3 convert.py CARAVAN

Hugging Face's LlamaForCausalLM saves tiny models in many shards; they are converted to both
layouts and back. Tensors must keep their bits, exports must load in transformers with the same
logits, and Meta's layout must give them by Meta's formulas (interleaved rotary pairs), written
here. Files of model parallelism are cut along Meta's axes and merged. Needs torch, transformers
and safetensors; not part of ./test, which needs no Python.
"""
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

CARAVAN = str(Path(sys.argv[1]).resolve())
TOKENS = [3, 77, 20, 5, 99, 1, 250, 33, 7, 8, 9, 200]
SIZES = dict(vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=8,
             num_key_value_heads=8, max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)
MODELS = [
    ("plain", dict(), torch.float32),
    ("grouped", dict(num_key_value_heads=2), torch.bfloat16),
    ("one key", dict(num_key_value_heads=1, rope_theta=500000.0), torch.float16),
    ("llama3", dict(rope_theta=500000.0, num_key_value_heads=4, rope_scaling=LLAMA3), torch.float32),
    ("linear", dict(rope_scaling=dict(rope_type="linear", factor=4.0)), torch.float32),
    ("tied", dict(tie_word_embeddings=True), torch.bfloat16),
]


def convert(*args, fails=False):
    done = subprocess.run([CARAVAN, "convert", *map(str, args)], capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


def tensors(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def assert_same_bits(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def hugging_face(folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double()


def meta(folder):
    """Meta's formulas: complex rotation of neighbours (llama/model.py, llama-models for the scaling)."""
    p = json.loads((folder / "params.json").read_text())
    w = torch.load(folder / "consolidated.00.pth", weights_only=True)
    w = {name: tensor.double() for name, tensor in w.items()}
    heads, kv, dim, length = p["n_heads"], p["n_kv_heads"], p["dim"], len(TOKENS)
    size = dim // heads
    rates = 1.0 / p["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    if p.get("use_scaled_rope"):
        waves = 8192 * rates / (2 * math.pi)
        share = ((waves - 1) / 3).clamp(0, 1)
        rates = (1 - share) * rates / 8 + share * rates
    turns = torch.polar(torch.ones(length, size // 2).double(), torch.outer(torch.arange(length).double(), rates))
    turn = lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns[:, None]).flatten(2)
    norm = lambda x, name: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + p["norm_eps"]) * w[f"{name}.weight"]
    x = w["tok_embeddings.weight"][TOKENS]
    for i in range(p["n_layers"]):
        product = lambda x, name: x @ w[f"layers.{i}.{name}.weight"].T
        y = norm(x, f"layers.{i}.attention_norm")
        q = turn(product(y, "attention.wq").view(length, heads, size))
        k = turn(product(y, "attention.wk").view(length, kv, size)).repeat_interleave(heads // kv, 1)
        v = product(y, "attention.wv").view(length, kv, size).repeat_interleave(heads // kv, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(size)
        scores = scores + torch.full((length, length), -math.inf).triu(1).double()
        x = x + product(torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(length, -1), "attention.wo")
        y = norm(x, f"layers.{i}.ffn_norm")
        gate = torch.nn.functional.silu(product(y, "feed_forward.w1"))
        x = x + product(gate * product(y, "feed_forward.w3"), "feed_forward.w2")
    return norm(x, "norm") @ w["output.weight"].T


def there_and_back(name, changes, dtype):
    torch.manual_seed(1)
    here = Path(name)
    LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).to(dtype).save_pretrained(here / "source", max_shard_size="60KB")
    convert(here / "source", here / "hf", "--shard-size", "50KB")
    source, logits = tensors(here / "source"), hugging_face(here / "source")
    assert_same_bits(source, tensors(here / "hf"))
    assert torch.equal(logits, hugging_face(here / "hf"))
    if name == "linear":
        assert "has no way to say" in convert(here / "source", here / "meta", "--to", "meta", fails=True)
        return
    convert(here / "source", here / "meta", "--to", "meta")
    # transformers turns and normalises in fp32.
    difference = ((logits - meta(here / "meta")).abs().max() / logits.abs().max()).item()
    assert difference < 1e-5, difference
    convert(here / "meta", here / "back", "--context", 512)
    assert_same_bits(source, tensors(here / "back"))
    print(f"{name}: the same bits; by Meta's formulas {difference:.1e}")


def model_parallel(parts, embedding_axis):
    folder = Path(f"parallel-{parts}-{embedding_axis}")
    folder.mkdir()
    (folder / "params.json").write_bytes(Path("plain/meta/params.json").read_bytes())
    whole = torch.load("plain/meta/consolidated.00.pth", weights_only=True)
    for rank in range(parts):
        part = {"rope.freqs": torch.ones(4)}
        for name, tensor in whole.items():
            axis = embedding_axis if "tok_emb" in name else int(".wo." in name or ".w2." in name)
            part[name] = tensor if "norm" in name else tensor.chunk(parts, axis)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    convert(folder, f"{folder}-hf", "--context", 512)
    assert_same_bits(tensors("plain/source"), tensors(f"{folder}-hf"))
    print(f"{parts} files of model parallelism: merged")


with tempfile.TemporaryDirectory() as scratch:
    os.chdir(scratch)
    for model in MODELS:
        there_and_back(*model)
    for cut in [(2, 1), (4, 1), (2, 0)]:
        model_parallel(*cut)
print("all as it should be")
