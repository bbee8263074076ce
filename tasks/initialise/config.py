"""Settings that decide the model that training starts from; no torch here."""

from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.model.model_config import ALIASES, ModelConfig, list_models
from tasks.artifacts.artifact import Stage

Role = Literal["clip", "vision", "text"]
REGISTRY = "models:/"
STAGE = Stage("initialise", 1, tools=("torch", "safetensors"), ignores=("origins",))


class InitialiseConfig(Config):
    ADDED: ClassVar[tuple[str, ...]] = ("context_length",)

    model: str
    """A shipped architecture's name (`evaclip models`), or a JSON file of one."""
    image_px: int | None = Field(default=None, gt=0)
    """Side of the input in pixels, a multiple of the patch; none = the architecture's own."""
    context_length: int | None = Field(default=None, gt=1)
    """Longest caption in tokens, with its start and end; none = the architecture's own. Positions
    of a file of another length are cut, or stretched behind the first 20."""
    clip: Path | None = None
    """A whole CLIP to go on from, also at another resolution (L/14 at 336 px), without `vision` and
    `text`: a file or folder of any known layout, or `models:/NAME@ALIAS` or `models:/NAME/VERSION`
    of the registry, as each of these three may be."""
    vision: Path | None = None
    """Weights for the image tower; none = random."""
    text: Path | None = None
    """Weights for the text tower; none = random."""
    allow_torchscript: bool = False
    """Whether the files may be TorchScript archives, which hold code (OpenAI's CLIP)."""
    origins: dict[str, str] = Field(default_factory=dict)
    """Path, as it is named above -> the advice to print when it does not exist."""
    seed: int = Field(default=0, ge=0)
    """Decides every value that no file gives."""

    @model_validator(mode="after")
    def _model_exists(self) -> Self:
        if self.clip is not None and (self.vision is not None or self.text is not None):
            raise ValueError("give either clip, which is a whole model, or vision and text")
        try:
            self.load_architecture()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def load_architecture(self) -> ModelConfig:
        """The model's config at the resolution and context length asked for."""
        config = ModelConfig.load(self.model)
        if self.context_length is not None:
            config = config.at_context_length(self.context_length)
        return config if self.image_px is None else config.at_image_px(self.image_px)

    def weight_sources(self) -> dict[Role, Path]:
        """The places of weights, in the order in which they are loaded."""
        named: dict[Role, Path | None] = {role: getattr(self, role) for role in get_args(Role)}
        return {role: path for role, path in named.items() if path is not None}

    def registered_models(self) -> dict[Role, str]:
        """Return those of them that the registry has, by their URIs."""
        named = {role: str(path) for role, path in self.weight_sources().items()}
        return {role: uri for role, uri in named.items() if uri.startswith(REGISTRY)}

    def outside_files(self) -> dict[str, Path]:
        """Role -> every outside file (or folder of a saved model) that decides the result."""
        registered = self.registered_models()
        sources = self.weight_sources().items()
        files: dict[str, Path] = {role: path for role, path in sources if role not in registered}
        if self.model not in [*list_models(), *ALIASES]:
            files["model"] = Path(self.model)
        return files

    def absent_files(self) -> dict[str, str]:
        """Role -> one sentence on each file that does not exist: which, and where to get it."""
        return {
            role: f"initialise.{role}: {path} does not exist; "
            + self.origins.get(str(path), "give a file, or a saved model's folder")
            for role, path in self.outside_files().items()
            if not path.exists()
        }
