"""A model in the form that other libraries load, where it computes the same: weights and configs
for open_clip, timm and transformers; both towers as ONNX graphs."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from evaclip_model.choices import Form, Library
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.model import model_config as shapes
from evaclip_model.model.clip import EvaClip
from evaclip_model.reading.transform import MEAN, STD
from evaclip_model.weights import load as loading
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE
from evaclip_model.weights.name_maps import foreign_names

ONNX_OPSET = 20
"""First with exact GELU as one operator. Attention as one operator (23) is no faster in onnxruntime
on a CPU, and older runtimes lack it."""
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_config.json")
_FORMS = json.loads(Path(__file__).with_name("export_forms.json").read_text())
"""Library -> what its config of any model of ours holds, null where the model decides; and timm's
names of image towers that it has, by ours."""
_INLINE_BYTES = 1 << 30
"""Largest tower kept inside its graph's file: protobuf ends at 2 GiB."""


def export_model(model: nn.Module, path: str | Path, as_: Form) -> tuple[Path, ...]:
    """Write a model for another library, its tensors in their dtype; returns the files written.

    Args:
        model: whose weights to write; it may be wrapped or sharded, as `save_weights` says.
        path: a file that ends in `.safetensors`, for the weights alone; or a folder, for the
            weights and the config under the names the library looks for: timm opens it as
            `local-dir:FOLDER`, transformers with `from_pretrained`, open_clip as `local-dir:FOLDER`
            where timm has the image tower by name; of other towers it has no config. For "onnx" a
            folder, as `export_onnx` says.

    Raises InputError: `as_` is unknown, `path` has another suffix of weights, or the library has no
    such architecture.
    """
    path = Path(path)
    if as_ not in (known := get_args(Form)):
        raise InputError(f"there is no export as '{as_}': choose one of {', '.join(known)}")
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise InputError(
            f"{path}: exports are written as safetensors, never as pickled files; give a name "
            "that ends in .safetensors, or a folder"
        )
    if as_ == "onnx":
        return export_onnx(model, path)
    is_file = path.suffix == ".safetensors"
    (path.parent if is_file else path).mkdir(parents=True, exist_ok=True)
    if as_ == "native":
        if is_file:
            loading.save_weights(model, path)
            return (path,)
        loading.save_model(model, path)
        return path / WEIGHTS_FILE, path / shapes.CONFIG_FILE
    inside = loading.unwrap_model(model)
    if as_ in ("open_clip", "timm"):
        _require_timm(inside.config.vision, as_)
    names = _OPEN_CLIP_FILES if as_ == "open_clip" else (WEIGHTS_FILE, shapes.CONFIG_FILE)
    weights_path = path if is_file else path / names[0]
    released = loading.released_tensors(model)
    tensors: dict[str, Tensor] = {}
    for entry in foreign_names(released, as_):
        tensors |= entry.split_native(released[entry.native])
    if tensors:
        loading.write_weights(tensors, weights_path)
    makers = {"timm": _timm_config, "transformers": _transformers_config}
    config = makers.get(as_, _open_clip_config)(inside) if tensors and not is_file else None
    if config is None:
        return (weights_path,)
    write_atomically(path / names[1], json.dumps(config, indent=1) + "\n")
    return weights_path, path / names[1]


def export_onnx(model: nn.Module, folder: str | Path) -> tuple[Path, ...]:
    """Write both towers as ONNX graphs in float32, whatever the model's dtype, for any batch size.

    `image.onnx` maps `images` [B, 3, H, H], normalised, to `image_features` [B, E]; `text.onnx`
    maps `tokens` int64 [B, L], L the context length, to `text_features` [B, E]. Neither normalises
    its features. Both carry as metadata `logit_scale` (the multiplier of cosines), `logit_bias` (of
    a sigmoid model; added to the products), `image_px`, `image_mean`, `image_std` (of RGB in
    [0, 1]) and `context_length`. Weights of a tower larger than 1 GiB lie beside its graph, in
    `image.onnx.data` or `text.onnx.data`. Returns the files written.

    The model may be wrapped, but not sharded. Raises InputError: torch's exporter lacks a package.
    """
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(
                f"ONNX export needs the package '{package}': pip install 'evaclip[onnx]'"
            ) from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    twin = _plain_twin(model)
    vision, text = twin.config.vision, twin.config.text
    facts = {
        "logit_scale": repr(float(twin.logit_scale.exp())),
        **({} if twin.logit_bias is None else {shapes.LOGIT_BIAS: repr(float(twin.logit_bias))}),
        "image_px": str(vision.image_px),
        "image_mean": json.dumps(MEAN),
        "image_std": json.dumps(STD),
        "context_length": str(text.context_length),
    }
    images = torch.zeros(2, 3, vision.image_px, vision.image_px)
    tokens = torch.zeros(2, text.context_length, dtype=torch.long)
    return (
        *_write_graph(twin.visual, images, ("images", "image_features"), folder / "image", facts),
        *_write_graph(twin.text, tokens, ("tokens", "text_features"), folder / "text", facts),
    )


def _plain_twin(model: nn.Module) -> EvaClip:
    """The model in float32 on the CPU with kernels that can be recorded; weights are shared."""
    with torch.device("meta"):
        twin = EvaClip(loading.unwrap_model(model).config, "sdpa")
    twin = twin.to_empty(device="cpu")  # tables are computed; weights' memory is never touched
    weights = {name: value.cpu().float() for name, value in loading.released_tensors(model).items()}
    if not weights:
        raise InputError("ONNX graphs are written from a whole model: save_model it first")
    weights |= {name: weights[name].reshape(1) for name in shapes.SCALARS if name in weights}
    if shapes.LOGIT_BIAS in weights:
        twin.logit_bias = nn.Parameter(weights[shapes.LOGIT_BIAS])
    twin.load_state_dict(weights, assign=True)
    return twin.eval().requires_grad_(False)


def _write_graph(
    tower: nn.Module, example: Tensor, names: tuple[str, str], path: Path, facts: dict[str, str]
) -> tuple[Path, ...]:
    program = torch.onnx.export(
        tower,
        (example,),
        dynamo=True,
        opset_version=ONNX_OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=names[:1],
        output_names=names[1:],
        external_data=False,
        verbose=False,
    )
    assert program is not None  # it is when no path is given
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of this machine
    program.model.metadata_props.update(facts)
    is_large = sum(p.numel() * p.element_size() for p in tower.parameters()) > _INLINE_BYTES
    # In a folder of its own: a graph holds the name of its weights' file.
    beside = path.with_name(f".{path.name}")
    beside.mkdir(exist_ok=True)
    graph = f"{path.name}.onnx"
    program.save(beside / graph, external_data=is_large)
    written = (f"{graph}.data", graph) if is_large else (graph,)
    for name in written:
        (beside / name).replace(path.with_name(name))
    shutil.rmtree(beside)
    return tuple(map(path.with_name, written))


def _require_timm(config: shapes.VisionConfig, library: Library) -> None:
    """Raises InputError: timm's Eva, which open_clip uses too, cannot be built like this."""
    if config.pooling != "class_token":
        what = "pooling 'mean' over the class token too"
    elif config.mlp == "swiglu" and not config.sub_norm:
        what = "SwiGLU without sub_norm in two weights"
    elif config.norm_placement == "residual_post" and config.layer_scale_init is not None:
        what = "layer scale after residual post-norm"
    else:
        return
    raise InputError(
        f"this image tower has no equal in timm, so there is no export as '{library}': timm has no "
        f"{what}; export it as 'native' or ONNX"
    )


def _timm_name(config: shapes.VisionConfig) -> str | None:
    for name, timm_name in _FORMS["timm names"].items():
        known = shapes.ModelConfig.load(name).vision
        if known.model_copy(update={"drop_path": config.drop_path}) == config:
            return str(timm_name)
    return None


def _timm_config(model: EvaClip) -> dict[str, Any]:
    vision, reference = model.config.vision, model.config.vision.rope_reference_grid
    arguments = {
        "img_size": vision.image_px,
        "patch_size": vision.patch_px,
        "embed_dim": vision.width,
        "depth": vision.layers,
        "num_heads": vision.heads,
        "qkv_fused": vision.fused_qkv,
        "mlp_ratio": (vision.mlp_width + 0.5) / vision.width,  # timm rounds the product down
        "swiglu_mlp": vision.mlp == "swiglu",
        "scale_mlp": vision.sub_norm,
        "scale_attn_inner": vision.sub_norm,
        "use_rot_pos_emb": reference is not None,
        "ref_feat_shape": None if reference is None else [reference, reference],
        "init_values": vision.layer_scale_init,
        "use_post_norm": vision.norm_placement == "residual_post",
    }
    form, classes = _FORMS["timm"], {"num_classes": model.config.embed_dim}
    pixels = {"input_size": [3, vision.image_px, vision.image_px], "mean": MEAN, "std": STD}
    return {
        **form,
        **classes,
        # The arguments give the whole geometry; a name is only where timm starts from.
        "architecture": _timm_name(vision) or _FORMS["timm names"]["EVA02-CLIP-B-16"],
        "num_features": vision.width,
        "model_args": form["model_args"] | arguments,
        "pretrained_cfg": form["pretrained_cfg"] | pixels | classes,
    }


def _transformers_config(model: EvaClip) -> dict[str, Any]:
    text = model.config.text
    return {
        **_FORMS["transformers"],
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "projection_dim": model.config.embed_dim,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": text.vocab_size - 1,
        "dtype": str(model.logit_scale.dtype).removeprefix("torch."),
    }


def _open_clip_config(model: EvaClip) -> dict[str, Any] | None:
    """open_clip's config; none for an image tower that timm, which builds it there, cannot name."""
    config, form = model.config, _FORMS["open_clip"]
    if (timm_name := _timm_name(config.vision)) is None:
        return None
    vision = {"image_size": config.vision.image_px, "timm_model_name": timm_name}
    return {
        "model_cfg": {
            **form["model_cfg"],
            "embed_dim": config.embed_dim,
            "vision_cfg": form["model_cfg"]["vision_cfg"] | vision,
            "text_cfg": config.text.model_dump(),
            **({} if model.logit_bias is None else {"init_logit_bias": model.logit_bias.item()}),
        },
        "preprocess_cfg": form["preprocess_cfg"] | {"mean": MEAN, "std": STD},
    }
