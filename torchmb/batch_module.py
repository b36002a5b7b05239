"""BatchModule: M models of one architecture as one module."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import check_alike
from .base import (
    AbstractBatchModule,
    StateDict,
    check_entries,
    check_state_dicts,
    entry_shapes,
    integer,
    load_entries,
    merge_batch,
    registered,
    split_batch,
    unstacked,
)
from .execution import Apart, Inputs, Kept, Models, RunLock, merged, one_by_one, vectorised
from .layerwise import native
from .pytree import map_leaves, map_tensors, take
from .seeds import initialised
from .shared import Shared
from .state import (
    Absent,
    Attributes,
    copied,
    is_batch_module,
    named_tensors,
    plain_attributes,
    plain_modules,
    stack_tensors,
    walk,
)
from .torch_private import apply_to_tensors, load_own_entries, save_own_entries, share_contents, version_of


class BatchModule(AbstractBatchModule):
    """`batch` models like `module`, each with weights of its own, as one module.

    Tensor arguments are (M, B, …), or wrapped in `shared`; other arguments are the same for all models. Tensors of the
    output are (M, B, …). What one model computes from its share is what `module` computes from it, whatever its forward
    does. Submodules, parameters and buffers have the names that they have in `module`; parameters and buffers have a
    leading dimension M.

    module: starts all models; it is left alone unless `inplace`, which makes it a part of the batch.
    batch: M; the number of `seeds` if it is None and they are given, else 1.
    seeds: M integers; model m is initialised as `module` would be after torch.manual_seed(seeds[m]).

    ValueError if `batch` < 1, or `batch` and `seeds` do not agree; TypeError if `module` or `seeds` are something else.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: int | None = None,
        inplace: bool = False,
        *,
        seeds: Iterable[int] | None = None,
    ) -> None:
        _check_is_module("module", module)
        if seeds is not None:
            if not isinstance(seeds, Iterable):
                raise TypeError(f"seeds must be integers, one for each model, got {seeds!r}")
            seeds = [integer("a seed", seed) for seed in seeds]
        if batch is None:
            batch = 1 if seeds is None else len(seeds)
        super().__init__(batch)
        if seeds is not None and len(seeds) != self.batch:
            raise ValueError(f"batch = {batch} models need as many seeds, got {len(seeds)}")
        self._build([module] * self.batch if seeds is None else initialised(module, seeds))
        if inplace:
            module.__dict__.update(vars(self._template))
            self._adopt(module)

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Module]) -> BatchModule:
        """A batch of existing models of one architecture, with their weights. They are left alone.

        They must be alike in all but the values of parameters and buffers. What cannot be compared is taken from the
        first: attributes other than numbers, strings, None and tuples of them, hooks, and whether they are in training.
        ValueError if there are none, or if anything else differs: types of submodules, names, shapes, dtypes, devices,
        ties or requires_grad of tensors, attributes. TypeError if one is no module.
        """
        modules = list(modules)
        for i, module in enumerate(modules):
            _check_is_module(f"module {i}", module)
        if not modules:
            raise ValueError("from_modules needs at least 1 module, got 0")
        check_alike(modules)
        self = cls.__new__(cls)
        AbstractBatchModule.__init__(self, len(modules))
        self._build(modules)
        return self

    def _build(self, modules: Sequence[nn.Module]) -> None:
        """Makes the template: the first module with the tensors of all, and with batch modules where registered."""
        self._plain: dict[str, nn.Module] = {}  # the registered modules as they were, for `unstack`
        for name, module in modules[0].named_modules():
            if is_batch_module(module):
                raise ValueError(f"{name or 'the module'} is a {type(module).__name__}: a batch already")
        instead: dict[int, Any] = dict(stack_tensors(modules, registered))
        for name, module in walk(modules[0], registered):
            if cls := registered(module):
                self._plain[name] = copied(module)
                if id(module) not in instead:
                    instead[id(module)] = self._batched(cls, [m.get_submodule(name) for m in modules])
        self._adopt(copied(modules[0], instead))

    def _batched(self, cls: type[AbstractBatchModule], modules: Sequence[nn.Module]) -> AbstractBatchModule:
        batch_module = cls.from_module(modules[0], self.batch).train(modules[0].training)
        _convert(batch_module, modules[0])
        _copy_requires_grad(modules[0], batch_module)
        if states := [m.state_dict() for m in modules if m.state_dict()]:
            batch_module.load_state_dicts(states)
        return batch_module

    def _adopt(self, root: nn.Module) -> None:
        """Makes what `root` contains the contents of this module, under the same names."""
        self._lock = RunLock()
        self._kept = Kept()
        self._refused = ""
        self.__dict__["_root"] = root  # no submodule: its names would get a prefix
        share_contents(self, root)
        self.training = root.training

    def _batch_module(self, name: str) -> AbstractBatchModule:
        found = self._template.get_submodule(name)
        assert isinstance(found, AbstractBatchModule)
        return found

    @property
    def _template(self) -> nn.Module:
        root: nn.Module = self.__dict__["_root"]
        return root

    # What a forward leaves in attributes of the root is to be found as in those of other modules.

    def __getattr__(self, name: str) -> Any:
        if self._is_of_root(name):
            return vars(self._template)[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_of_root(name):
            setattr(self._template, name, value)
        else:
            super().__setattr__(name, value)

    def _is_of_root(self, name: str) -> bool:
        """Whether it is a plain attribute of the root, and this module has none of that name."""
        own = self.__dict__
        return (
            "_root" in own
            and name not in own
            and not hasattr(type(self), name)
            and name in plain_attributes(self._template)
        )

    # What torch does with a module's own contents, a class such as BatchNorm may do in its own way.

    def train(self, mode: bool = True) -> BatchModule:
        self.training = mode
        self._template.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> BatchModule:
        apply_to_tensors(self._template, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        save_own_entries(self._template, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        load_own_entries(self._template, *args)

    def forward(self, *args: Any, merge: bool = True, split: bool = True, **kwargs: Any) -> Any:
        """All models on their share of the arguments, tensors (M, B, …) → the template's output, tensors (M, B, …).

        Outputs that cannot be stacked are a list of M. Threads that call one batch take turns.
        merge=False: tensors are merged already, (B · M, …), index b * M + m. split=False: those of the output shall be.
        ValueError if a tensor's first dimension is not M (or no multiple of M, if merged), or if the output cannot be
        merged.
        """
        # torch.compile would try to look into vmap, and would leave the models to run one by one.
        compiling = torch.compiler.is_dynamo_compiling()
        run = torch.compiler.disable(self._run) if compiling else self._run  # type: ignore[no-untyped-call]
        output = run(self._inputs(args, kwargs, merged=not merge))
        if isinstance(output, Apart):
            if not split:
                raise ValueError(
                    f"the outputs of the {self.batch} models cannot be merged, since they cannot be stacked; "
                    "with split=True they are a list"
                )
            return list(output)
        return output if split else map_tensors(merge_batch, output)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], merged: bool) -> Inputs:
        inputs = Inputs()

        def place(leaf: Any) -> Any:
            if isinstance(leaf, Shared):
                return leaf.value
            if not isinstance(leaf, Tensor):
                return leaf
            return inputs.place(split_batch(leaf, self.batch) if merged else self._checked(leaf))

        inputs.rest = map_leaves(place, (args, kwargs))
        return inputs

    def _checked(self, tensor: Tensor) -> Tensor:
        if tensor.dim() < 1 or tensor.shape[0] != self.batch:
            raise ValueError(
                f"a batch of {self.batch} models takes tensors ({self.batch}, B, ...), got {tuple(tensor.shape)}; "
                "wrap what all models share in torchmb.shared(...)"
            )
        return tensor

    def _run(self, inputs: Inputs) -> Any:
        with self._lock:  # for as long as the template holds the tensors of this run
            return self._run_alone(inputs)

    def _run_alone(self, inputs: Inputs) -> Any:
        if (output := native(self._template, inputs, self.batch)) is not None:
            return output
        if isinstance(self._template, AbstractBatchModule):
            return merged(self._template, inputs)
        models = Models(self._template, self.batch, self._kept)
        if self._refused:
            return one_by_one(models, inputs)
        return self._try(models, inputs)

    def _try(self, models: Models, inputs: Inputs) -> Any:
        """Under vmap, or else model by model from where it began."""
        attributes = Attributes(models.modules)
        tensors = models.plain_tensors(attributes).values()
        plain = [(t, t.clone(), version_of(t)) for t in tensors if not t.is_inference()]
        devices = {t.device for t in inputs.tensors if t.is_cuda}
        versions = models.versions(inputs)
        rng = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}
        try:
            return vectorised(models, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            attributes.restore()
            for tensor, content, version in plain:
                if version_of(tensor) != version:
                    tensor.detach().copy_(content)
            if models.batch_modules or versions != models.versions(inputs):
                raise
            torch.set_rng_state(rng[0])
            for device, state in rng[1].items():
                torch.cuda.set_rng_state(state, device)
            reason = _reason(error, self._template)
        output = one_by_one(models, inputs)  # outside `except`: an error of the model's own is one error, not two
        self._refused = reason
        warnings.warn(
            f"the {self.batch} models of {type(self._template).__name__} run one by one, since vmap refuses {reason}",
            stacklevel=7,  # where the batch is called
        )
        return output

    def load_state_dicts(self, state_dicts: StateDict | Sequence[StateDict], strict: bool = True) -> None:
        """Loads state dicts of the original class, one for each model or one for all.

        Nothing is loaded if one does not fit: ValueError if their number, a shape or an extra state differs, or, when
        `strict`, a name; TypeError if a tensor is none.
        """
        dicts, own = check_state_dicts(state_dicts, self.batch), self._own_state()
        shapes = entry_shapes(own, models=True)
        for name, plain in self._plain.items():
            below = entry_shapes(plain.state_dict(), models=False)
            shapes |= {_join(name, key): shape for key, shape in below.items()}
        check_entries(shapes, dicts, strict)
        load_entries(self._template, own, dicts)
        for name, plain in self._plain.items():
            if plain.state_dict():
                self._batch_module(name).load_state_dicts([_below(state, name) for state in dicts], strict)

    def state_dicts(self) -> list[OrderedDict[str, Any]]:
        """State dicts of the models, copies, each of which loads into the original class."""
        own = self._own_state()
        found = [unstacked(own, i) for i in range(self.batch)]
        for name, plain in self._plain.items():
            if plain.state_dict():
                for state, below in zip(found, self._batch_module(name).state_dicts(), strict=True):
                    state.update({_join(name, key): value for key, value in below.items()})
        return found

    def _own_state(self) -> StateDict:
        """The state dict without what registered batch modules keep."""
        state = self.state_dict()
        for name in [n for n in state if any(n.startswith(_join(outer, "")) for outer in self._plain)]:
            del state[name]
        return state

    def unstack(self, index: int) -> nn.Module:
        """Model `index` (negative ones count from the end) as a plain module of the original class, a copy.

        IndexError if there is no such model.
        """
        if not -self.batch <= index < self.batch:
            raise IndexError(f"model {index} of {self.batch}")
        instead: dict[int, Any] = {}
        for tensor in named_tensors(self._template, is_batch_module).values():
            one = tensor[index].detach().clone()
            instead[id(tensor)] = nn.Parameter(one, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else one
        for name, plain in self._plain.items():
            instead[id(self._batch_module(name))] = one_module = copied(plain)
            if plain.state_dict():
                one_module.load_state_dict(self._batch_module(name).state_dicts()[index], assign=True)
            _copy_requires_grad(self._batch_module(name), one_module)
        modules = plain_modules(self._template)
        shares = self._kept.shares(modules, index)
        for place, value in self._kept.held(modules).items():
            if take(value)[0] or place in self._kept.lists:
                instead[id(value)] = copy.deepcopy(map_tensors(lambda t: t.detach().clone(), shares[place]))
        model = copied(self._template, instead)
        for module in model.modules():
            for name in [n for n, value in vars(module).items() if value is Absent]:
                delattr(module, name)
        return model

    def extra_repr(self) -> str:
        return f"{type(self._template).__name__}, batch={self.batch}"


def _check_is_module(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {value!r}")


def _convert(batch_module: nn.Module, module: nn.Module) -> None:
    """Gives a batch module the devices and dtypes of `module`: by names, and those of its first tensor to the rest."""
    given = named_tensors(module, lambda _: False)
    if not given:
        return
    first = next((t for t in given.values() if t.is_floating_point()), next(iter(given.values())))
    own = named_tensors(batch_module, lambda _: False)
    like = {id(tensor): given.get(name, first) for name, tensor in own.items()}

    def converted(tensor: Tensor) -> Tensor:
        other = like.get(id(tensor), first)
        dtype = other.dtype if other.is_floating_point() == tensor.is_floating_point() else tensor.dtype
        return tensor.to(other.device, dtype)

    apply_to_tensors(batch_module, converted)


def _copy_requires_grad(source: nn.Module, target: nn.Module) -> None:
    """By names; parameters of other names are frozen if all of the source are."""
    flags = {name: p.requires_grad for name, p in source.named_parameters()}
    trained = any(flags.values()) or not flags
    for name, p in target.named_parameters():
        p.requires_grad_(flags.get(name, p.requires_grad and trained))


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer else inner


def _below(state: StateDict, name: str) -> dict[str, Any]:
    """The entries of a submodule, under the names that they have there."""
    prefix = _join(name, "")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _reason(error: Exception, template: nn.Module) -> str:
    """The module whose code was running, and the first line of what vmap said."""
    names = {id(module): name for name, module in template.named_modules()}
    where, frame = "", error.__traceback__
    while frame is not None:
        where = names.get(id(frame.tb_frame.f_locals.get("self")), where)
        frame = frame.tb_next
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{where or 'its forward'}: {type(error).__name__}: {said}"
