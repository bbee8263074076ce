"""The registered model as MLflow loads it: an image and candidate labels to probabilities.

Covers: the pyfunc class. MLflow stores this file as source, beside a copy of `evaclip_model` and
the weights, so it runs where this project is not installed and no pickle is involved.
Not here: registering (registry.py). Nothing of `tasks` is imported: it is not shipped.

A string is only ever base64 text, never a path: a served model that opens paths would give every
client the files of its server.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import pandas
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from evaclip_model import InputError, decode_image, image_transform, open_model, tokenize

IMAGE = "image"
LABELS = "candidate_labels"
OUTPUT = "output"


class ZeroShotClassifier(PythonModel):
    """Zero-shot classification with a trained CLIP model."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the shipped weights, on the CPU."""
        self.model = open_model(Path(context.artifacts["model"]))
        self.transform = image_transform(self.model)

    def predict(
        self,
        context: PythonModelContext | None,
        model_input: pandas.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pandas.DataFrame:
        """Classify images, or embed them.

        Args:
            context: not used; the weights are open.
            model_input: column `image`, one image file's bytes (or their base64 text) a row.
            params: `candidate_labels`, texts such as "a red apple"; `output`, "probabilities"
                (columns label, probabilities in the labels' order) or "embeddings" (column
                embedding, unit length).

        Raises:
            InputError: a row that is no image, no labels, or an unknown output.
        """
        params = params or {}
        output = params.get(OUTPUT, "probabilities")
        if output not in ("probabilities", "embeddings"):
            raise InputError(f"'{OUTPUT}' is 'probabilities' or 'embeddings', not '{output}'")
        labels = [str(label) for label in params.get(LABELS, ()) if str(label)]
        if output == "probabilities" and not labels:
            raise InputError(f"give the labels to choose from in the parameter '{LABELS}'")
        with torch.inference_mode():
            features = self._encode(list(model_input[IMAGE]))  # [N, D]
            if output == "embeddings":
                return pandas.DataFrame({"embedding": features.tolist()})
            texts = self.model.encode_text(tokenize(labels), normalize=True)  # [L, D]
            logits = self.model.logit_scale.exp() * features @ texts.T  # [N, L]
            probabilities = logits.float().softmax(dim=-1)
        return pandas.DataFrame(
            {
                "label": [labels[best] for best in probabilities.argmax(dim=-1).tolist()],
                "probabilities": probabilities.tolist(),
            }
        )

    def _encode(self, images: list[object]) -> torch.Tensor:
        pixels = [self.transform(_decoded(image, row)) for row, image in enumerate(images)]
        return self.model.encode_image(torch.stack(pixels), normalize=True)


def _decoded(image: object, row: int) -> Any:
    """A row's image; bytes as they are, text as base64.

    Raises:
        InputError: neither, or bytes that are no image.
    """
    try:
        data = base64.b64decode(image, validate=True) if isinstance(image, str) else image
        if not isinstance(data, bytes):
            raise TypeError(type(data).__name__)
        return decode_image(data)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InputError(
            f"row {row}, column '{IMAGE}': expected the bytes of an image file, or their base64 "
            f"text ({error})"
        ) from None


set_model(ZeroShotClassifier())
