"""Predict with the ONNX graph of this folder; needs onnxruntime, tokenizers and numpy only.

    python predict.py "A text." "Another text."
    python predict.py --pair "The first sentence." "The second sentence."
    python predict.py --int8 "A text."

Prints a line of JSON for each text or pair: a label with its probability (classifier), a number
(regression), or a vector (encoder).
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Predictor:
    """Runs the tokenizer and the graph of an export on texts.

    Args:
        folder: folder of the export; by default the folder of this file.
        int8: use ``model.int8.onnx`` instead of ``model.onnx``.
        num_threads: CPU threads; 0: as many as cores.
    """

    def __init__(
        self, folder: str | Path = Path(__file__).parent, int8: bool = False, num_threads: int = 0
    ) -> None:
        folder = Path(folder)
        self.config = _read(folder / "config.json")
        settings = _read(folder / "tokenizer_config.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(int(settings["model_max_length"]))
        pad_token = settings["pad_token"]
        if isinstance(pad_token, dict):
            pad_token = pad_token["content"]
        self.tokenizer.enable_padding(
            pad_id=self.tokenizer.token_to_id(pad_token), pad_token=pad_token
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        file = folder / ("model.int8.onnx" if int8 else "model.onnx")
        self.session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        pooling = folder / "1_Pooling" / "config.json"
        self.takes_cls = pooling.exists() and bool(_read(pooling)["pooling_mode_cls_token"])
        modules = folder / "modules.json"
        self.normalizes = modules.exists() and any(
            "Normalize" in module["type"] for module in _read(modules)
        )

    def encode(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
        """Tokenise texts or pairs; return the graph's inputs by name, each (texts, tokens)."""
        rows = self.tokenizer.encode_batch(list(texts))
        values = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        return {
            node.name: np.array(values[node.name], dtype=np.int64)
            for node in self.session.get_inputs()
        }

    def __call__(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> np.ndarray:
        """Return a classifier's logits (texts, labels), or an encoder's vectors (texts, width)."""
        inputs = self.encode(texts)
        (output,) = self.session.run(None, inputs)
        if output.ndim == 2:
            return output
        mask = inputs["attention_mask"][:, :, None]
        vectors = output[:, 0] if self.takes_cls else (output * mask).sum(1) / mask.sum(1)
        if self.normalizes:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def predict(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[Any]:
        """Return a prediction for each text or pair of texts.

        A prediction is ``{"label": ..., "probability": ...}`` for a classifier, a number for a
        regression, or a list of numbers, the vector, for an encoder.
        """
        outputs = self(texts)
        if not any("ForSequenceClassification" in name for name in self.config["architectures"]):
            return [row.tolist() for row in outputs]
        if outputs.shape[1] == 1:
            return [float(row[0]) for row in outputs]
        probabilities = np.exp(outputs - outputs.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        names = self.config.get("id2label", {})  # transformers omits it for two unnamed classes
        predictions = []
        for row in probabilities:
            best = int(row.argmax())
            label = names.get(str(best), f"LABEL_{best}")
            predictions.append({"label": label, "probability": float(row[best])})
        return predictions


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main(args: Sequence[str]) -> int:
    """Run the command line ``args``, without the program's name; return the exit code."""
    flags = [arg for arg in args if arg.startswith("--")]
    texts = [arg for arg in args if not arg.startswith("--")]
    is_pair = "--pair" in flags
    wrong = ""
    if unknown := set(flags) - {"--int8", "--pair"}:
        wrong = f"There is no option {min(unknown)}.\n\n"
    elif is_pair and len(texts) != 2:
        wrong = f"--pair needs two texts, not {len(texts)}.\n\n"
    if wrong or not texts:
        print(wrong + (__doc__ or ""), file=sys.stderr)
        return 2
    predictor = Predictor(int8="--int8" in flags)
    for prediction in predictor.predict([(texts[0], texts[1])] if is_pair else texts):
        print(json.dumps(prediction))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
