#!/usr/bin/env python3
"""The Python peers, and the preparation of the models that all peers read.

    peers.py prepare FOLDER MINILM   write FOLDER/{minilm,bert-base}/{config.json,model.safetensors,model.onnx}
    peers.py versions                print the versions of the packages as JSON
    peers.py PEER FOLDER THREADS     serve one peer on standard input and output

PEER is `onnxruntime`, `transformers` (eager) or `torch` (the same module through torch.compile). The line protocol is
described in rust/protocol/src/lib.rs. Needs the packages of requirements.txt.
"""
import json
import os
import pathlib
import shutil
import statistics
import sys
import time

SEED = 20


def token_ids(batch, length):
    """The ids that every peer computes with: `token_ids` of rust/protocol/src/lib.rs."""
    state = batch * 1000 + length
    ids = []
    for _ in range(batch * length):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        ids.append(1000 + (state >> 8) % 20000)
    return ids


def export_onnx(folder):
    """Writes model.onnx beside a model folder's weights: ids and mask in, last hidden state out, both extents free."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()

    class LastHiddenState(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    example = torch.full((2, 24), 1000, dtype=torch.int64)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=512)
    extents = {0: batch, 1: length}
    torch.onnx.export(
        LastHiddenState(),
        (example, torch.ones_like(example)),
        folder / "model.onnx",
        dynamo=True,
        external_data=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamic_shapes={"input_ids": extents, "attention_mask": extents},
    )


def prepare(folder, minilm):
    """Builds every model folder that is not there yet."""
    import torch
    from transformers import BertConfig, BertModel

    target = folder / "minilm"
    if not (target / "model.onnx").exists():
        target.mkdir(parents=True, exist_ok=True)
        for item in minilm.iterdir():
            if item.is_dir():
                shutil.copytree(item, target / item.name, dirs_exist_ok=True)
            elif item.suffix != ".onnx":
                shutil.copy(item, target)
        export_onnx(target)
    target = folder / "bert-base"
    target.mkdir(parents=True, exist_ok=True)
    # Mean pooling without normalisation: differences stay as large as they are.
    kinds = ["Transformer", "Pooling"]
    modules = [{"idx": i, "name": str(i), "path": "", "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)]
    (target / "modules.json").write_text(json.dumps(modules))
    if not (target / "model.onnx").exists():
        torch.manual_seed(SEED)
        # Dropout is off in all peers; candle wants the field.
        model = BertModel(BertConfig(), add_pooling_layer=False).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norm weights and biases that are not 1 and 0, so that no peer can leave them out unseen.
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(target, safe_serialization=True)
        export_onnx(target)


class OnnxRuntime:
    def __init__(self, folder, threads):
        self.folder, self.threads, self.sessions = folder, threads, {}

    def prepare(self, name, ids):
        import numpy
        import onnxruntime

        if name not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
            path = str(self.folder / name / "model.onnx")
            self.sessions[name] = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        ids = numpy.array(ids, dtype=numpy.int64)
        return self.sessions[name], {"input_ids": ids, "attention_mask": numpy.ones_like(ids)}

    def step(self, prepared):
        session, feeds = prepared
        return session.run(None, feeds)[0]

    def bytes(self, output):
        return output.astype("<f4").tobytes()


class Transformers:
    compiled = False

    def __init__(self, folder, threads):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.folder, self.models = folder, {}

    def prepare(self, name, ids):
        import torch
        from transformers import AutoModel

        if name not in self.models:
            model = AutoModel.from_pretrained(self.folder / name, add_pooling_layer=False).eval()
            self.models[name] = torch.compile(model, dynamic=False) if self.compiled else model
        ids = torch.tensor(ids, dtype=torch.int64)
        return self.models[name], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def step(self, prepared):
        model, inputs = prepared
        return model(**inputs).last_hidden_state

    def bytes(self, output):
        return output.contiguous().numpy().astype("<f4").tobytes()


class Torch(Transformers):
    compiled = True


PEERS = {"onnxruntime": OnnxRuntime, "transformers": Transformers, "torch": Torch}


def answer(peer, prepared, words):
    """Carries out one command; returns what follows `ok`."""
    verb, name, batch, length, last = words
    key = (name, int(batch), int(length))
    if key not in prepared:
        flat = token_ids(key[1], key[2])
        rows = [flat[row * key[2] : (row + 1) * key[2]] for row in range(key[1])]
        prepared[key] = peer.prepare(name, rows)
    ready = prepared[key]
    output = peer.step(ready)
    if verb == "run":
        milliseconds = []
        for _ in range(max(1, int(last))):
            start = time.perf_counter()
            peer.step(ready)
            milliseconds.append((time.perf_counter() - start) * 1e3)
        return f"{statistics.median(milliseconds):.6f}"
    if verb == "check":
        pathlib.Path(last).write_bytes(peer.bytes(output))
        return "hidden"
    raise ValueError(f"no command {verb}")


def serve(kind, folder, threads):
    # The protocol owns standard output: whatever libraries print goes to standard error.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer, prepared = PEERS[kind](folder, threads), {}
    print("ready", file=channel)
    for line in sys.stdin:
        words = line.split()
        if words == ["quit"]:
            return
        try:
            print("ok", answer(peer, prepared, words), file=channel)
        except Exception as error:  # noqa: BLE001 (the driver decides what a failure means)
            text = f"{type(error).__name__}: {error}".replace("\n", " ")
            print("error", text[:2000], file=channel)


def versions():
    import importlib.metadata

    names = ["onnxruntime", "torch", "transformers", "onnx", "onnxscript", "numpy"]
    print(json.dumps({name: importlib.metadata.version(name) for name in names}))


def main():
    if sys.argv[1:2] == ["prepare"] and len(sys.argv) == 4:
        prepare(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
    elif sys.argv[1:] == ["versions"]:
        versions()
    elif len(sys.argv) == 4 and sys.argv[1] in PEERS:
        serve(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
