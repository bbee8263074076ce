"""The registered model as MLflow loads it: images and labels to probabilities, or to embeddings.

MLflow stores this file as source, beside a copy of `evaclip_model` and the weights, so it runs
where this project is not installed (nothing of `tasks` is imported) and no pickle is involved.

    column `image`, parameter `candidate_labels`     -> columns label, probabilities
    column `image`, parameter `output`="embeddings"  -> column embedding
    column `text`                                    -> column embedding

A string in `image` is only ever base64 text, never a path: a served model that opens paths would
give every client the files of its server. What a request may cost is bounded.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from torch import Tensor

import evaclip_model
from evaclip_model import InputError, decode_image, image_transform, open_model, tokenize
from evaclip_model.weights.checkpoint_files import at_hand

IMAGE, TEXT = "image", "text"
LABELS, OUTPUT, ERRORS = "candidate_labels", "output", "errors"
CHOICES = {OUTPUT: ("probabilities", "embeddings"), ERRORS: ("raise", "coerce")}
"""Values of these parameters, the default first."""
DEVICE = "device"
"""Key of MLflow's `model_config`: where the model runs, the CPU by default."""
ROWS = "max_rows"
"""Key of MLflow's `model_config`: rows of one call, for whoever has the model in a process of their
own, such as `load_model(uri, model_config={"max_rows": 10_000_000})`."""

MOST_ROWS = 16_384
"""By default; more than the 10,000 of a batch of Spark's."""
MOST_LABELS = 4096
MOST_IMAGE_BYTES = 32 << 20
MOST_CHARACTERS = 4096
"""Of one text or label; only the first 75 tokens count."""
_BATCH = 32


class ZeroShotModel(PythonModel):
    """A trained CLIP model: zero-shot classification, image and text embeddings."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the shipped weights, or fetch, verify and open those that are referred to."""
        with at_hand(Path(context.artifacts["model"]), _download_weights) as folder:
            model = open_model(folder)
        settings = context.model_config or {}
        self.device = torch.device(settings.get(DEVICE, "cpu"))
        self.most_rows = int(settings.get(ROWS) or MOST_ROWS)
        self.model = model.to(self.device)
        self.transform = image_transform(self.model)

    def predict(
        self,
        context: PythonModelContext | None,
        model_input: pandas.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pandas.DataFrame:
        """Classify images, embed images, or embed texts.

        Args:
            model_input: column `image`, one image file's bytes (or their base64 text) a row; or
                column `text`, one text a row.
            params: `candidate_labels`, texts such as "a red apple"; `output`, "probabilities"
                (columns label, probabilities in the labels' order) or "embeddings" (column
                embedding, unit length); `errors`, "raise" or "coerce": an image that cannot be read
                refuses the call, or leaves its row empty and says why in the column error.

        Raises:
            MlflowException: anything else is given, or more than one call may ask for. A server
                answers it with status 400.
        """
        try:
            with torch.inference_mode():
                return self._answer_rows(model_input, params or {})
        except InputError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None

    def _answer_rows(self, rows: pandas.DataFrame, params: dict[str, Any]) -> pandas.DataFrame:
        asked = [name for name in (IMAGE, TEXT) if name in rows]
        if len(asked) != 1:
            raise InputError(f"give one column: '{IMAGE}' with images, or '{TEXT}' with texts")
        if not 0 < len(rows) <= self.most_rows:
            raise InputError(
                f"give 1 to {self.most_rows} rows in one call, not {len(rows)}; in a process of "
                f"your own, load the model with model_config={{'{ROWS}': N}} for more"
            )
        for name, known in CHOICES.items():
            if params.get(name, known[0]) not in known:
                raise InputError(f"'{name}' is '{known[0]}' or '{known[1]}', not '{params[name]}'")
        if asked == [TEXT]:
            embedded = self._encode_texts(list(rows[TEXT]), f"column '{TEXT}'")
            return _make_frame({"embedding": embedded.tolist()})
        reasons: list[str | None] | None = [] if params.get(ERRORS) == "coerce" else None
        if params.get(OUTPUT) == "embeddings":
            embedded = self._encode_images(rows[IMAGE], reasons)
            return _make_frame({"embedding": embedded.tolist()}, reasons)
        labels = [label for label in params.get(LABELS, ()) if label != ""]
        if not 0 < len(labels) <= MOST_LABELS:
            raise InputError(
                f"give the labels to choose from in the parameter '{LABELS}', at most {MOST_LABELS}"
            )
        texts = self._encode_texts(labels, f"parameter '{LABELS}'")  # [L, D]
        images = self._encode_images(rows[IMAGE], reasons)
        probabilities = self.model.compute_probabilities(images @ texts.T)  # [N, L]
        best = [str(labels[place]) for place in probabilities.argmax(dim=-1).tolist()]
        return _make_frame({"label": best, "probabilities": probabilities.tolist()}, reasons)

    def _encode_images(self, images: Sequence[object], reasons: list[str | None] | None) -> Tensor:
        """[N, D], unit length. Where there is a list `reasons`, it gets a reason or None for every
        image, and one that cannot be read counts as black."""
        side = self.model.config.vision.image_px

        def read(image: object, row: int) -> Tensor:
            if reasons is None:
                return self.transform(_decode_row(image, row))
            reasons.append(None)
            try:
                return self.transform(_decode_row(image, row))
            except InputError as error:
                reasons[-1] = str(error)
                return torch.zeros(3, side, side)

        def encode(batch: Sequence[object], first: int) -> Tensor:
            pixels = [read(one, first + n) for n, one in enumerate(batch)]
            return self.model.encode_image(torch.stack(pixels).to(self.device), normalize=True)

        return _in_batches(images, encode)

    def _encode_texts(self, texts: Sequence[Any], where: str) -> Tensor:
        """[N, D], unit length."""

        def encode(batch: Sequence[Any], first: int) -> Tensor:
            for place, one in enumerate(batch, first):
                if not isinstance(one, str) or len(one) > MOST_CHARACTERS:
                    expected = f"expected a text of at most {MOST_CHARACTERS} characters"
                    raise InputError(f"{where}, entry {place}: {expected}")
            tokens = tokenize(batch, self.model.config.text.context_length)
            return self.model.encode_text(tokens.to(self.device), normalize=True)

        return _in_batches(texts, encode)


def _in_batches(values: Sequence[Any], encode: Callable[[Sequence[Any], int], Tensor]) -> Tensor:
    starts = range(0, len(values), _BATCH)
    return torch.cat([encode(values[n : n + _BATCH], n).float().cpu() for n in starts])


def _make_frame(
    columns: dict[str, list[Any]], reasons: list[str | None] | None = None
) -> pandas.DataFrame:
    """The columns; where there are reasons also that of errors, alone in rows that have one."""
    if reasons is None:
        return pandas.DataFrame(columns)
    frame = pandas.DataFrame(columns, dtype=object)
    frame.loc[[reason is not None for reason in reasons]] = None
    return frame.assign(error=reasons)


def _decode_row(image: object, row: int) -> Any:
    """A row's image; bytes as they are, text as base64. InputError: neither, bytes that are not an
    image of a known format, or too many of them."""
    try:
        data = base64.b64decode(image, validate=True) if isinstance(image, str) else image
        if isinstance(data, bytearray | memoryview):  # as DuckDB gives a BLOB
            data = bytes(data)
        if not isinstance(data, bytes):
            raise TypeError(type(data).__name__)
        if len(data) > MOST_IMAGE_BYTES:
            raise ValueError(f"{len(data):,} bytes, more than {MOST_IMAGE_BYTES:,}")
        return decode_image(data)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InputError(
            f"row {row}, column '{IMAGE}': expected the bytes of an image file, or their base64 "
            f"text ({error})"
        ) from None


def _download_weights(uri: str, folder: Path) -> Path:
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))


def _require_own_code() -> None:
    """Refuse, by an ImportError, to run on another version's code: Python keeps one package of a
    name a process."""
    own, imported = Path(__file__).parent / "code" / "evaclip_model", Path(evaclip_model.__file__)
    if own.is_dir() and _read_sources(own) != _read_sources(imported.parent):
        raise ImportError(
            f"this process runs other code of evaclip_model already ({imported.parent}): load this "
            "version of the model in a process of its own"
        )


def _read_sources(package: Path) -> dict[Path, bytes]:
    return {file.relative_to(package): file.read_bytes() for file in package.rglob("*.py")}


_require_own_code()
set_model(ZeroShotModel())
