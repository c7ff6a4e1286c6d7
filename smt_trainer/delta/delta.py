"""The delta: a folder with the trained blocks, their positions and a record of their base.

    smt_delta.safetensors   <module>.blocks         [n, br, bc]  trained values (not differences, so merging is exact)
                            <module>.block_indices  [n, 2] int32 (row, column) in the module's grid
                            <parameter>             whole tensors of `modules_to_save`, norms, biases
                            its metadata holds the manifest: format, configuration, grids, name and fingerprint of the
                            base, dtype of its weights, checksum of all this
    smt_config.json         a copy of the manifest, for people and other programs to read

The tensors file alone is the delta. It is replaced in one step, so an interrupted write leaves the earlier delta. Both
files are plain data; nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smt_trainer.delta.checks import (
    WEIGHT_DTYPES,
    check_complete,
    check_dtypes,
    check_finite,
    check_manifest,
    check_whole,
    take_indices,
    widened,
)
from smt_trainer.delta.folder import CONFIG_FILE, DELTA_FILE, GENERATION_CONFIG_FILE
from smt_trainer.errors import SMTError
from smt_trainer.files import load_json, write_atomically, write_text
from smt_trainer.manifest import load_tensors, refusing_damage, sealed
from smt_trainer.model.checkpoint import CONFIG, EXPLICIT
from smt_trainer.model.made_up import embeddings, made_up
from smt_trainer.model.names import plain_name
from smt_trainer.model.sharded import assign, full_shape, full_tensor
from smt_trainer.model.whole import find_whole
from smt_trainer.selection.block_selection import BlockSelection, base_name
from smt_trainer.sparse.convert import (
    Model,
    SMTState,
    changed_statistics,
    find_linears,
    get_state,
    is_smt_model,
    merge_and_unload,
    rewrite_as,
    whole_parameters,
)
from smt_trainer.sparse.fingerprint import Fingerprint, saved_tensors
from smt_trainer.sparse.linear import smt_linears
from smt_trainer.sparse.write_back import write_back

logger = logging.getLogger(__name__)

# What of a configuration training decides.
LABELS = ("id2label", "label2id", "problem_type")
SPECIAL_TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id"}
FORMAT = "1"
MANIFEST = "smt"


@dataclass(frozen=True)
class Delta:
    """A checked delta in memory.

    Attributes:
        selection: the blocks, their model and how they were chosen.
        blocks: module name -> trained values [n, br, bc], in the order of `selection.block_indices`.
        whole: name of a parameter or buffer -> tensor, for what is trained or was made up whole.
        base: checksums of the base (see `sparse/fingerprint.py`).
        architecture: class of the trained model, such as "LlamaForCausalLM".
        unnamed: whole tensors that the configuration does not name: loading made them up, or forward changes them.
        weight_dtype: dtype of the base weights in training; merging into this dtype is exact.
    """

    selection: BlockSelection
    blocks: dict[str, Tensor]
    whole: dict[str, Tensor]
    base: Fingerprint
    weight_dtype: torch.dtype
    architecture: str = ""
    unnamed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, indices in self.selection.block_indices.items():
            values, expected = self.blocks.get(name), (len(indices), *self.selection.grids[name].block_shape)
            if values is None or tuple(values.shape) != expected:
                found = "none" if values is None else f"shape {list(values.shape)}"
                raise SMTError(
                    f"the delta's blocks of `{name}` should have shape {list(expected)}, got {found}. It is "
                    "damaged; save or download it again."
                )

    @classmethod
    def of(cls, model: nn.Module, *, master: bool = False) -> Delta:
        """Return the delta of a rewritten model; a collective when the model is sharded over ranks.

        Args:
            model: rewritten by `convert_to_smt`, `load_delta` or SMTTrainer.
            master: keep the blocks in the master dtype, to continue training; by default, cast them to the dtype of
                the weights, as forward and merging do.

        Raises:
            SMTError: the model trains no blocks.
        """
        state, blocks = get_state(model), {}
        for name, linear in smt_linears(model):
            dtype = linear.blocks.dtype if master else linear.weight.dtype
            blocks[name] = full_tensor(linear.blocks).to("cpu", dtype)[linear.row_major_order()]
        whole = {name: full_tensor(tensor).cpu().contiguous() for name, tensor in whole_parameters(model)}
        # FSDP2 puts a class of its own, with a prefix, on top.
        architecture = next(kind.__name__ for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
        unnamed = sorted((state.made_up | changed_statistics(model)) & whole.keys())
        return cls(state.selection, blocks, whole, state.base, state.weight_dtype, architecture, unnamed)

    def save(self, folder: str | Path) -> None:
        """Write the delta to a folder; make the folder if needed, and replace an older delta in one step.

        Raises:
            SMTError: a value is NaN or infinite. The older delta stays.
        """
        check_finite(self)
        selection = self.selection.to_dict()
        for module in selection["modules"].values():
            del module["block_indices"]
        manifest = {
            "format": FORMAT,
            "fingerprint": asdict(self.base),
            "architecture": self.architecture,
            "unnamed": self.unnamed,
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "whole": sorted(self.whole),
            "selection": selection,
        }
        master = self.selection.config.master_dtype
        tensors = {
            f"{name}.blocks": blocks if blocks.dtype == WEIGHT_DTYPES[master] else widened(self, blocks)
            for name, blocks in self.blocks.items()
        }
        tensors |= {f"{name}.block_indices": found.int() for name, found in self.selection.block_indices.items()}
        tensors = {name: tensor.contiguous() for name, tensor in {**tensors, **self.whole}.items()}
        manifest = sealed(manifest, tensors)
        metadata = {"format": "pt", MANIFEST: json.dumps(manifest)}
        write_atomically(Path(folder, DELTA_FILE), lambda path: save_file(tensors, path, metadata=metadata))
        write_text(Path(folder, CONFIG_FILE), json.dumps(manifest, indent=2))

    @classmethod
    def load(cls, folder: str | Path) -> Delta:
        """Read and check a delta folder. Raise `SMTError` if it is missing, damaged or out of range."""
        manifest, tensors = load_tensors(Path(folder, DELTA_FILE), MANIFEST, FORMAT, "delta")
        with refusing_damage(f"delta in {folder}"):
            check_manifest(manifest, folder)
            blocks, described = {}, manifest["selection"]
            for name, module in described["modules"].items():
                indices = take_indices(tensors, name)
                order = torch.argsort(indices[:, 0] * (1 + indices[:, 1].max()) + indices[:, 1]) if len(indices) else []
                module["block_indices"] = indices[order].tolist()
                if len(indices):
                    blocks[name] = tensors.pop(f"{name}.blocks")[order]
            selection = BlockSelection.from_dict(described)
            if sorted(tensors) != manifest["whole"]:
                raise SMTError(
                    f"the delta in {folder} is damaged: expected the whole tensors {manifest['whole']}, got "
                    f"{sorted(tensors)}. Save or download it again."
                )
            base = Fingerprint(**manifest["fingerprint"])
            dtype = WEIGHT_DTYPES[manifest["weight_dtype"]]
            delta = cls(selection, blocks, tensors, base, dtype, manifest["architecture"], manifest["unnamed"])
            check_dtypes(delta)
            check_finite(delta)
            check_whole(delta)
            return delta


def save_delta(model: nn.Module, folder: str | Path, *, master: bool = False) -> None:
    """Write the trained blocks of a rewritten model: `Delta.of(model, master=master).save(folder)`.

    Raises:
        SMTError: the model trains no blocks.
    """
    Delta.of(model, master=master).save(folder)


def load_delta(model: Model, folder: str | Path, *, merge: bool = False) -> Model:
    """Put a delta into a model, in place.

    Args:
        model: the plain base model, which is rewritten and can be trained further; or a model that already trains
            the same blocks.
        folder: a delta folder or a checkpoint of SMTTrainer.
        merge: make the model plain again with the trained values in its weights.

    Returns:
        The same model.

    Raises:
        SMTError: the delta is damaged, or belongs to another base or other blocks. The model stays unchanged.
    """
    put_delta(model, Delta.load(folder))
    return merge_and_unload(model) if merge else model


def put_delta(model: nn.Module, delta: Delta, *, has_weights: bool = True) -> None:
    """Put a delta that is already in memory into a model, as `load_delta` without merging.

    Args:
        model: plain, or training the same blocks. A plain one gets the vocabulary of the delta.
        delta: what to put into it.
        has_weights: False on a rank that will get the base weights from another one; they are not checked then.
    """
    if is_smt_model(model):
        _check_same_blocks(model, delta)
        destinations = _whole_destinations(model, delta)
    else:
        linears = find_linears(model, delta.selection)
        if has_weights:
            check_base(delta, base_name(model), _differences(model, delta))
        _resize_vocabulary(model, delta)
        _refuse_lost(model, delta)
        destinations = _whole_destinations(model, delta)
        whole = find_whole(model, delta.selection.config, linears, stored=delta.whole)
        check_complete(model, delta, whole)
        dtype = next(iter(linears.values())).weight.dtype
        # What the configuration names, and what only the first loading knew.
        named = tuple(f"{name}." for name in whole)
        whole = (*whole, *(name for name in delta.whole if not f"{name}.".startswith(named)))
        rewrite_as(model, SMTState(delta.selection, whole, delta.base, dtype, frozenset(delta.unnamed)))
    for name, linear in smt_linears(model):
        assign(linear.blocks, delta.blocks[name][linear.row_major_order().argsort()])
    for name, tensor in delta.whole.items():
        assign(destinations[name], tensor)
    write_back(linear for _, linear in smt_linears(model))


def from_delta(folder: str | Path, auto_class: Any = None, *, base: str | None = None, merge: bool = True, **kwargs):
    """Load a delta's base model and put the delta into it: weights, labels, special tokens and generation config.

    Args:
        folder: a delta folder.
        auto_class: the class to load the base with; by default the class that was trained.
        base: hub name or path of the base; by default the name that the delta records.
        merge: return a plain model.
        kwargs: passed to `auto_class.from_pretrained`; `dtype` defaults to that of training.

    Raises:
        SMTError: as in `load_delta`; or `base` is not given, and the delta records none or `trust_remote_code` would
            run the code of the one that it names.
    """
    delta = Delta.load(folder)
    if base is None:
        base, _, revision = (delta.selection.base_model or "").partition("@")
        if revision:
            kwargs.setdefault("revision", revision)
        if base and kwargs.get("trust_remote_code"):
            raise SMTError(
                f"trust_remote_code=True runs code of the base, and the delta in {folder} names {base!r} as its base: "
                "its author would decide whose code runs. Say base= yourself."
            )
    if not base:
        raise SMTError(f"the delta in {folder} records no base model; pass base=<hub name or path>.")
    trained = load_config(folder)
    # With a configuration, from_pretrained takes no field of it.
    labels = {key: trained[key] for key in LABELS if key in trained and "config" not in kwargs}
    with refusing_damage(f"configuration beside the delta in {folder}"):
        if "id2label" in labels:
            labels["id2label"] = {int(number): label for number, label in labels["id2label"].items()}
    model = (auto_class or _trained_class(delta)).from_pretrained(
        base, **{"dtype": delta.weight_dtype} | labels | kwargs
    )
    put_delta(model, delta)
    for key in SPECIAL_TOKENS & trained.keys():
        setattr(model.config, key, trained[key])
    if Path(folder, GENERATION_CONFIG_FILE).is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return merge_and_unload(model) if merge else model


def load_config(folder: str | Path) -> dict[str, Any]:
    """Return the configuration of the trained model that lies beside a delta; an empty one if there is none."""
    path = Path(folder, CONFIG)
    config = load_json(path, "model configuration") if path.is_file() else {}
    return {key: value for key, value in config.items() if key != EXPLICIT} if isinstance(config, dict) else {}


def _trained_class(delta: Delta) -> Any:
    import transformers

    # The name comes from a file; only a model's class is meant.
    found = getattr(transformers, delta.architecture, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModelForCausalLM


def check_base(delta: Delta, name: str | None, differences: list[str]) -> None:
    """Refuse a base that differs from the base of training; warn if only its name differs.

    Args:
        delta: what to put into the base.
        name: of the base, if known.
        differences: names of the tensors of the base that have other values than in training.

    Raises:
        SMTError: there are differences.
    """
    expected = delta.selection.base_model
    if differences:
        raise SMTError(
            f"the delta was trained on {expected or 'another base model'}. {name or 'This model'} has other values in "
            f"{len(differences)} of its {len(delta.base.checksums)} tensors, such as `{differences[0]}`. Load the base "
            f"of training, in {delta.base.dtype} or finer."
        )
    if expected and name and expected.partition("@")[0].split("/")[-1] != name.partition("@")[0].split("/")[-1]:
        logger.warning("The delta names %s as its base. This model is %s; the weights agree.", expected, name)


def _differences(model: nn.Module, delta: Delta) -> list[str]:
    """Return the names of the base's tensors that a plain model has with other values."""
    tensors = dict(saved_tensors(model))
    return delta.base.differences(tensors, lambda name: full_tensor(tensors[name]))


def _resize_vocabulary(model: nn.Module, delta: Delta) -> None:
    """Give a model as many token embeddings as the delta has, if the delta stores them."""
    for name in embeddings(model):
        tensor, resize = delta.whole.get(name), getattr(model, "resize_token_embeddings", None)
        if tensor is not None and callable(resize) and len(tensor) != len(model.get_parameter(name)):
            resize(len(tensor), mean_resizing=False)


def _refuse_lost(model: nn.Module, delta: Delta) -> None:
    """Raise `SMTError` if loading made up parameters of a model that the delta does not hold."""
    lost = [name for name in made_up(model) if name not in delta.whole]
    if lost:
        raise SMTError(
            f"loading made up `{lost[0]}` of the {type(model).__name__}, and the delta does not hold it. Load the base "
            f"as {delta.architecture or 'the class of training'}."
        )


def _check_same_blocks(model: nn.Module, delta: Delta) -> None:
    state = get_state(model)
    ours, theirs = state.selection.block_indices, delta.selection.block_indices
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    if not same or state.base != delta.base:
        raise SMTError(
            "the delta holds other blocks than this model trains, or blocks of another base. Load it into the plain "
            "base model instead."
        )


def _whole_destinations(model: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """Return a model's tensors by name; raise `SMTError` unless what the delta trains whole fits them."""
    destinations = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in delta.whole.items():
        if name not in destinations or full_shape(destinations[name]) != tuple(tensor.shape):
            found = list(full_shape(destinations[name])) if name in destinations else "none"
            raise SMTError(
                f"the delta holds `{name}` of shape {list(tensor.shape)}; this model has {found}. Load the base with "
                "the same head (number of labels) as in training."
            )
    return destinations
