"""Method: the base class of all PEFT methods. An instance is one adapter: its parameters and their places."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...nn.match import check_names, matches
from ...nn.module_tree import WRAPPED
from ..core.adapter_tree import AdapterModules, AdapterTree
from ..core.config import SIZES, TASK_HEADS, PeftConfig
from .base_tables import pop_base_tables
from .injector import Injector
from .parameter_overrides import ParameterOverrides

_BUFFER = "buffer:"
"""Prefix of the names of buffers in a run's checkpoint."""

# PEFT's prefixes in the keys of a file: for adapters of layers, and for the head saved with a prompt.
FILE_PREFIX, PROMPT_PREFIX = "base_model.model.", "base_model."


_HARMLESS_SIZE = 16384  # largest size in a configuration that needs no tensor of that size in the file


class PreparedCall(NamedTuple):
    """The arguments of the base model's forward or generate, and a function that is applied to its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    finish: Callable[[Any], Any] | None = None


class CalledModel(Protocol):
    """The interface of the called PeftModel, or of a replica of it, that methods use."""

    base_model: nn.Module
    prompt_encoder: AdapterModules


class Method:
    """The interface of a method, with defaults for methods without special behaviour.

    A subclass's __init__ completes the configuration and builds the trained modules; it does not change the model.
    attach() adds the modules to the model. `tree` stores their places, `overrides` the places of trained copies of the
    model's own parameters; the instance holds no module afterwards. The modules and hooks run in the model's forward,
    if `selection.has(self.name)` is true.
    """

    loads_in_peft: ClassVar[bool] = False
    file_prefix: ClassVar[str] = FILE_PREFIX
    needs: tuple[str, ...] = ()  # other adapters that this one uses

    def __init__(self, config: PeftConfig, injector: Injector, name: str) -> None:
        self.config = config
        self.injector = injector
        self.name = name
        self.tree = AdapterTree(injector, name)
        self.overrides = ParameterOverrides(injector, name)
        self.hooks: list[RemovableHandle] = []

    @classmethod
    def check_names(cls, config: PeftConfig, injector: Injector) -> None:
        """Raise ValueError, with the nearest names, if a name in `config` matches nothing in the model.

        This check is for configurations written by users. Those from files are not checked, because the tensors of a
        file determine its layers.
        """
        modules = [name for name in injector.modules(aliases=True) if name]
        check_names("modules_to_save", config.modules_to_save or (), modules)
        usual = TASK_HEADS.get(config.task_type or "", ())
        if usual and not config.modules_to_save and not any(matches(usual, name) for name in modules):
            warnings.warn(
                f"task_type: the head of a {config.task_type} model is called {' or '.join(usual)}, and this model has "
                "none; name the head to train in modules_to_save",
                stacklevel=4,
            )

    @classmethod
    def config_of_file(cls, config: PeftConfig) -> PeftConfig:
        """Return the configuration with which an adapter is built before its file is loaded, given the file's
        configuration.

        It avoids the computation of start values that the file's tensors replace.
        """
        return config

    @classmethod
    def fitted_to_file(cls, config: PeftConfig, injector: Injector, tensors: dict[str, Tensor]) -> PeftConfig:
        """Return the configuration without layers that PEFT, which wrote the file, does not see in this model."""
        return config

    @classmethod
    def check_file(
        cls, config: PeftConfig, injector: Injector, tensors: dict[str, Tensor], extra_tensors: dict[str, Tensor]
    ) -> None:
        """Raise ValueError if `config` requires more than the files hold. Called before anything is allocated."""
        held = (*tensors.values(), *extra_tensors.values())
        longest = max((size for tensor in held for size in tensor.shape), default=0)
        for field in SIZES:
            size = getattr(config, field, None)
            if size is not None and size > max(longest, _HARMLESS_SIZE):
                raise ValueError(
                    f"adapter_config.json: {field} must fit the tensors of the file, whose longest side is {longest}, "
                    f"got {size}"
                )

    @property
    def parts(self) -> list[Method]:
        """Return the components of a composite method, each of which runs as a method."""
        return []

    # Places in the model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each parameter of the adapter once, with its name in the adapter's file if it is in the file."""
        yield from self.tree.named_parameters()
        yield from self.overrides.named_parameters().items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield each parameter of the adapter once."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the adapter's file by their paths in the model."""
        return {**self.tree.state_dict(), **self.overrides.state_dict()}

    def attach(self) -> None:
        """Add the adapter's modules, and its copies of the model's parameters, to the model.

        An error in attach() is followed by detach().
        Raises ValueError if the model has no module that the configuration can adapt.
        """
        self.overrides.add_modules(self.config.heads)
        if getattr(self.config, "ensure_weight_tying", False):
            self.overrides.add_tied()

    def detach(self) -> None:
        """Remove everything that attach() has added to the model, also if attach() failed before its end."""
        for hook in self.hooks:
            hook.remove()
        self.overrides.detach()
        self.tree.detach()

    def row_mixing_unsupported(self) -> str | None:
        """Return the reason why this adapter cannot serve single rows of a batch, or None if it can."""
        return f"it replaces {min(self.overrides.paths)} for the whole batch" if self.overrides.paths else None

    def merge_unsupported(self) -> str | None:
        """Return the reason why this adapter cannot be merged into weights, or None if it can."""
        return f"{type(self).__name__} is not an update of weights"

    def set_trainable(self, trainable: bool) -> None:
        """Set requires_grad of the adapter's floating-point parameters; copies that never train stay frozen."""
        fixed = {id(copy) for path, copy in self.overrides.copies.items() if path in self.overrides.fixed}
        for parameter in self.parameters():
            parameter.requires_grad_(trainable and parameter.is_floating_point() and id(parameter) not in fixed)

    def prepare_forward(self, model: CalledModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PreparedCall:
        """Change the arguments of the base model's forward. model: the called model, which may be a replica.

        Raises ValueError if the call lacks an argument that the method needs.
        """
        return PreparedCall(args, kwargs)

    def prepare_generate(self, model: CalledModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PreparedCall:
        """Change the arguments of the base model's generate."""
        return PreparedCall(args, kwargs)

    # In training

    def watch_training(self) -> None:
        """Hook that is called when training may begin: in train(), set_adapter and peft_loss."""

    def peft_loss(self) -> Tensor | None:
        """Return the auxiliary loss, which is added to the loss of the task, or None."""
        return None

    def step(self, global_step: int) -> None:
        """Update schedules; called after backward and before zero_grad, once for each optimizer step."""

    # In files

    def before_save(self) -> None:
        """Raise RuntimeError if the adapter is in a state that must not be saved."""

    def file_config(self) -> dict[str, Any]:
        """Return the contents of adapter_config.json, in PEFT's fields if PEFT has the method."""
        values = {name: v for name, v in self.config.to_dict().items() if name not in self.config.own_fields}
        return {**values, "inference_mode": True}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of adapter_model.safetensors, under PEFT's keys if PEFT has the method."""
        tensors = self.state_dict()
        if self.loads_in_peft:  # PEFT requires a tied parameter under all of its names
            tensors |= {name: tensors[first].clone() for name, first in self.overrides.tied().items()}
        return {f"{self.file_prefix}{key}": value for key, value in tensors.items()}

    trained_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of adapter_config.json that training changes, so that checkpoints of one run differ in them."""

    def load_config(self, config: PeftConfig) -> None:
        """Take the `trained_fields` of a file with whose tensors this adapter will be filled."""
        self.config = self.config.replace(**{name: getattr(config, name) for name in self.trained_fields})

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors that tensors() returned; raise ValueError for missing, unexpected or misshapen ones."""
        self.fill(tensors_by_path(tensors, self.file_prefix))

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Load the adapter's own tensors by load_into, and compare those of the base model that are also in the file.

        Copies of tied parameters are untied if the file has different values for them.
        """
        tensors = dict(tensors)
        for name, first in self.overrides.tied().items():
            if name in tensors and not torch.equal(tensors[name], tensors.setdefault(first, tensors[name])):
                self.overrides.untie(name)
            else:
                tensors.pop(name, None)
        replacing = pop_base_tables(self.injector, tensors, set(self.state_dict()))
        load_into(self, tensors)
        for path, (stored_as, value) in replacing.items():
            self.overrides.add_fixed(path, value, stored_as=stored_as)

    def extras(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return (values, tensors) that PEFT's layout cannot hold; values["config"] replaces fields of the file's
        configuration.
        """
        if not self.config.own_fields:
            return {}, {}
        values = self.config.to_dict()
        return {"config": {name: values[name] for name in (*self.config.own_fields, "peft_type")}}, {}

    def load_extras(self, values: dict[str, Any], tensors: dict[str, Tensor], *, is_trainable: bool) -> None:
        """Load the result of extras(); not called for a file that PEFT wrote."""

    # In checkpoints of a run, which needs more state to continue than a finished adapter

    def training_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return (values, tensors) that a resumed run needs in addition to the trained parameters to compute the same
        bits.
        """
        values, tensors = self.extras()
        return values, {**tensors, **{f"{_BUFFER}{name}": buffer for name, buffer in self.tree.named_buffers()}}

    def load_training_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Load the result of training_state(), also at the end of a run."""
        self.load_extras(values, {n: t for n, t in tensors.items() if not n.startswith(_BUFFER)}, is_trainable=True)
        for name, buffer in self.tree.named_buffers():
            if f"{_BUFFER}{name}" in tensors:  # absent in checkpoints of older versions
                buffer.copy_(tensors[f"{_BUFFER}{name}"])


def all_methods(injector: Injector) -> list[Method]:
    """Return the methods of all adapters, each followed by its parts."""
    return [method for name in injector.adapters for method in methods_of(injector, name)]


def methods_of(injector: Injector, name: str) -> list[Method]:
    """Return the methods of adapter `name`, each followed by its parts.

    Raises ValueError for an unknown name.
    """
    if name not in injector.adapters:
        raise ValueError(f"adapter_name: must be one of {list(injector.adapters)}, got {name!r}")
    return [part for method in injector.adapters[name] for part in (method, *method.parts)]


class AdapterMethods(list[Method]):
    """The methods that one adapter combines, and their parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield ("<number of the method>.<name in the adapter's file>", parameter)."""
        for number, method in enumerate(self):
            yield from ((f"{number}.{path}", parameter) for path, parameter in method.named_parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all methods of the adapter."""
        return (parameter for _, parameter in self.named_parameters())


class Adapters(Mapping[str, AdapterMethods]):
    """The adapters of a model and their parameters."""

    def __init__(self, methods: Mapping[str, list[Method]]) -> None:
        self._methods = methods

    def __getitem__(self, name: str) -> AdapterMethods:
        return AdapterMethods(self._methods[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield ("<adapter>.<number of the method>.<name in the adapter's file>", parameter)."""
        for name, methods in self.items():
            yield from ((f"{name}.{path}", parameter) for path, parameter in methods.named_parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all adapters."""
        return (parameter for _, parameter in self.named_parameters())


def tensors_by_path(tensors: dict[str, Tensor], prefix: str = FILE_PREFIX) -> dict[str, Tensor]:
    """Return the tensors of a file by their paths in the model.

    PEFT writes a prefix before each path, and a shorter one for prompts; a model's own paths may begin in the same way.
    With bias="all", PEFT also writes the biases of modules_to_save a second and third time, under names of its wrapper.
    Names of torch's wrappers, which PEFT writes if they were present before the adapter, are removed.
    """
    paths = {key.removeprefix(prefix).removeprefix("base_model."): value for key, value in tensors.items()}
    paths = {".".join(part for part in key.split(".") if part not in WRAPPED): value for key, value in paths.items()}
    return {p: v for p, v in paths.items() if ".modules_to_save." not in p and ".original_module." not in p}


class HasTensors(Protocol):
    """A module or a Method."""

    def state_dict(self) -> dict[str, Any]: ...


def load_into(module: HasTensors, tensors: dict[str, Tensor]) -> None:
    """Copy tensors strictly into `module`'s parameters and buffers, in their dtypes.

    Raises ValueError, which lists the missing, unexpected and misshapen keys.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    both = sorted(own.keys() & tensors.keys())
    misshapen = [f"{k} {list(tensors[k].shape)} for {list(own[k].shape)}" for k in both
                 if own[k].shape != tensors[k].shape]  # fmt: skip
    if missing or unexpected or misshapen:
        raise ValueError(
            f"adapter file: must hold exactly the tensors of the adapter, got missing {missing}, unexpected "
            f"{unexpected}, of another shape {misshapen}; load it over the model that it was trained on"
        )
    if unlike := [k for k in both if own[k].is_floating_point() != tensors[k].is_floating_point()]:
        raise ValueError(
            f"adapter file: {unlike[0]} must be of a type like {own[unlike[0]].dtype}, got {tensors[unlike[0]].dtype}"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
