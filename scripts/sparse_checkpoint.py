#!/usr/bin/env python3
"""Writes a checkpoint of zeros in the shape of a llama config.json: a sparse model.safetensors that takes no disk space.

Usage: sparse_checkpoint.py CONFIG_JSON FOLDER
"""
import json
import os
import shutil
import struct
import sys

config_path, folder = sys.argv[1:3]
config = json.load(open(config_path))
hidden, inner = config["hidden_size"], config["intermediate_size"]
heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
head = config.get("head_dim", hidden // heads)
vocab = config["vocab_size"]
shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
if not config.get("tie_word_embeddings"):
    shapes["lm_head.weight"] = [vocab, hidden]
for layer in range(config["num_hidden_layers"]):
    p = f"model.layers.{layer}."
    shapes[p + "input_layernorm.weight"] = [hidden]
    shapes[p + "post_attention_layernorm.weight"] = [hidden]
    shapes[p + "self_attn.q_proj.weight"] = [heads * head, hidden]
    shapes[p + "self_attn.k_proj.weight"] = [kv * head, hidden]
    shapes[p + "self_attn.v_proj.weight"] = [kv * head, hidden]
    shapes[p + "self_attn.o_proj.weight"] = [hidden, heads * head]
    shapes[p + "mlp.gate_proj.weight"] = [inner, hidden]
    shapes[p + "mlp.up_proj.weight"] = [inner, hidden]
    shapes[p + "mlp.down_proj.weight"] = [hidden, inner]
header, at = {}, 0
for name, shape in sorted(shapes.items()):
    size = 2
    for extent in shape:
        size *= extent
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
    at += size
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
os.makedirs(folder, exist_ok=True)
shutil.copy(config_path, os.path.join(folder, "config.json"))
with open(os.path.join(folder, "model.safetensors"), "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + at)
print(f"{at} bytes of weights in {folder}")
