"""Set an adaptor into a model by swapping classes, and take it out again.

Three objects of the model change their class and nothing else: the wrapped layer (it hands its
output to the adaptor), the *seam* (the module that sees the attention mask and so knows which rows
ask), and for a causal model the seam is the model itself, whose `generate` is followed too.
Parameters, `state_dict` names, `isinstance` and hooks stay as they are. A new model made from an
attached one's class is a plain one.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .adaptor import GraceAdaptor
from .continuous import PLAN, check_served, follow
from .forwards import plan_forward, plan_step, prompt_length, warn_later_turn, whole_prefill
from .packed import PackedPlan
from .place import newcomer, place_of
from .state import Generation
from .torch_private import next_node_number

_FURTHER = "grace_further"
"""Where a seam keeps the adaptors of the layers that were attached after the first."""

_WRAPPERS = re.compile(r"(^|\.)(base_model\.model|_orig_mod|module)(?=\.)")


def find_layer(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return the full name and the module that `name` means.

    Args:
        model: the model.
        name: dots or brackets (`h[3].mlp`), `.weight` and `.bias` ignored, a unique suffix is
            enough; wrappers' prefixes (PEFT, `torch.compile`) do not matter.

    Raises:
        ValueError: no module or more than one has this name; the near matches are listed.
    """
    wanted = re.sub(r"\[(\w+)\]", r".\1", name.strip())
    wanted = re.sub(r"\.(weight|bias)$", "", wanted).strip(".")
    modules = {n: m for n, m in model.named_modules() if n}
    plain = {n: _WRAPPERS.sub("", "." + n).strip(".") for n in modules}
    wanted = _WRAPPERS.sub("", "." + wanted).strip(".")
    exact = [n for n, p in plain.items() if p == wanted]
    found = exact or [n for n, p in plain.items() if p.endswith("." + wanted)]
    if len(found) == 1:
        return found[0], modules[found[0]]
    near = found or difflib.get_close_matches(wanted, list(modules), n=5, cutoff=0.3)
    problem = "is ambiguous" if found else "is not in the model"
    raise ValueError(f"layer must name one module, got {name!r}, which {problem}; near: {near[:5]}")


class GraceLayer:
    """Mixin of the wrapped layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _wrapped(self, _adapt_output, args, kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Follow the model to its device; an empty probe says where fn moves things. Its dtype is
        # not followed: keys must keep the bits they were made with.
        adaptor: GraceAdaptor | None = self.__dict__.get("grace")
        if adaptor is not None:
            adaptor.move(fn(torch.empty(0, device=adaptor.codebook.keys.device)).device)
        return _beneath(self, "_apply")(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (GraceLayer, type(self).grace_base), self.__dict__  # type: ignore[attr-defined]


class GraceSeam:
    """Mixin of the module whose forward sees the mask: plans each forward before it runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _wrapped(self, _planned_forward, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin = GraceGenerator if isinstance(self, GraceGenerator) else GraceSeam
        return _rebuild, (mixin, type(self).grace_base), self.__dict__  # type: ignore[attr-defined]


class GraceGenerator(GraceSeam):
    """Mixin of a model that generates: one lookup at the prompt's end, latched for what follows."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return _by_each(self, _generate, _beneath(self, "generate"), args, kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        adaptor: GraceAdaptor | None = self.__dict__.get("grace")
        if adaptor is not None and adaptor.active:
            check_served(adaptor)
        manager = _beneath(self, "init_continuous_batching")(*args, **kwargs)
        if adaptor is not None:
            follow(manager, self)
        return manager

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        own = _beneath(self, "prepare_inputs_for_generation")
        return _by_each(self, _planned_inputs, own, args, kwargs)


def _by_each(module: Any, wrap: Callable[..., Any], beneath: Any, args: Any, kwargs: Any) -> Any:
    """Call a method of a seam with `wrap` round it, once for each adaptor that it plans for."""
    for adaptor in module.__dict__.get(_FURTHER, ()):
        beneath = _round(module, wrap, adaptor, beneath)
    adaptor = module.__dict__.get("grace")
    if adaptor is None:
        return beneath(*args, **kwargs)
    return wrap(module, adaptor, beneath, args, kwargs)


def _round(module: Any, wrap: Callable[..., Any], adaptor: GraceAdaptor, beneath: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrap(module, adaptor, beneath, args, kwargs)

    return wrapped


def _generate(
    model: Any, adaptor: GraceAdaptor, generate: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    if not adaptor.active:
        return generate(*args, **kwargs)
    if adaptor.plan is not None:
        raise ValueError(
            "generate must be called outside editor.plan(...): a plan names the rows of a "
            "single forward, and generate plans each of its own"
        )
    whole_prefill(adaptor, kwargs, getattr(model, "generation_config", None))
    if adaptor.generation is None:  # an assistant inside generate keeps a cache of its own
        warn_later_turn(adaptor, kwargs)
    state = Generation(prompt_length(args, kwargs))
    _stay_in_place(model, adaptor)
    _follow_preparing(model)
    try:
        # enabled: it ends as it begins, whatever other threads switch off meanwhile.
        with adaptor.using(generation=state, enabled=True, ends=None):
            out = generate(*args, **kwargs)
    finally:
        if state.latched is not None:
            adaptor.thread.give_back(state.latched)
    # Inside another generate this is an assistant's, which may leave before the layer.
    if state.planned and not state.reached and adaptor.generation is None:
        warnings.warn(
            f"generate was not edited: the forward of {shadowed(model)} was replaced after "
            "attaching by one that does not call it; replace it before attaching",
            stacklevel=4,
        )
    return out


def _planned_inputs(
    model: Any, adaptor: GraceAdaptor, prepare: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Prepare the inputs of a forward of `generate`, and plan it by what comes out."""
    if adaptor.generation is None:
        return prepare(*args, **kwargs)
    state = adaptor.generation
    with adaptor.using(generation=None):  # it may call what it has replaced, which plans nothing
        inputs = prepare(*args, **kwargs)
    state.plan = plan_step(adaptor, state, args, kwargs, inputs)
    state.prepared = True
    state.planned = state.planned or state.plan is not None
    return inputs


class _InstancePrepare:
    """A `prepare_inputs_for_generation` of the instance, planned like that of the class."""

    def __init__(self, model: Any, prepare: Any) -> None:
        self.model, self.prepare = model, prepare
        functools.update_wrapper(self, prepare)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _by_each(self.model, _planned_inputs, self.prepare, args, kwargs)


def _follow_preparing(model: Any) -> None:
    # Prompt tuning and others set it on the instance, and set it anew after each generate.
    own = model.__dict__.get("prepare_inputs_for_generation")
    if own is not None and not (isinstance(own, _InstancePrepare) and own.model is model):
        model.__dict__["prepare_inputs_for_generation"] = _InstancePrepare(model, own)


def _wrapped(module: Any, wrap: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    forward = _beneath(module, "forward")
    # A forward of the instance may end here: a bound one that somebody has from an earlier attach.
    if isinstance(module.__dict__.get("forward"), InstanceForward):
        return forward(*args, **kwargs)
    return wrap(module, forward, args, kwargs)


def _beneath(module: Any, name: str) -> Any:
    """Return a method as the module's own class has it, without ours.

    Not by `super()`: a bound forward that somebody holds may be called after `detach`.
    """
    own = type(module)
    return functools.partial(getattr(getattr(own, "grace_base", own), name), module)


@functools.cache
def _swapped(mixin: type, base: type) -> type:
    # The model keeps its class name (transformers writes it into configurations); a wrapped layer
    # shows in print(model).
    name = f"Grace{base.__name__}" if mixin is GraceLayer else base.__name__
    members: dict[str, Any] = {"grace_base": base, "__module__": base.__module__}
    members["grace_arguments"] = tuple(inspect.signature(base.forward).parameters)[1:]  # type: ignore[attr-defined]
    methods = ("forward", "generate", "prepare_inputs_for_generation", "init_continuous_batching")
    for method in methods:
        if hasattr(mixin, method) and hasattr(base, method):
            members[method] = _with_signature(getattr(mixin, method), getattr(base, method))
    members.update(
        (own, vars(mixin)[own]) for own in ("_apply", "__reduce_ex__") if own in vars(mixin)
    )
    # The module's own class first: Python gives an object another class only if both are laid out
    # by the same one, which for two bases is the first.
    made = type(name, (base, mixin), members)
    made.__doc__ = base.__doc__
    return made


def _with_signature(function: Any, like: Any) -> Any:
    # transformers reads the signature of forward to decide which inputs a model takes.
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, None, function.__closure__
    )
    copy.__doc__ = like.__doc__
    copy.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return copy


def _rebuild(mixin: type, base: type) -> nn.Module:
    # Unpickling and deepcopy: the swapped class exists only in the process that made it.
    cls: Any = _swapped(mixin, base)
    module: nn.Module = cls.__new__(cls)
    return module


def core_of(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers: those of `torch.compile`, PEFT and parallel training."""
    while True:
        compiled = dict(model.named_children()).get("_orig_mod")
        if compiled is not None:
            model = compiled
        elif callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def is_attached(module: nn.Module) -> bool:
    """Return whether `module` carries an adaptor."""
    return isinstance(module, (GraceLayer, GraceSeam)) and "grace" in module.__dict__


def attach(
    model: nn.Module,
    layer: nn.Module,
    seam: nn.Module,
    adaptor: GraceAdaptor,
    *,
    generates: bool,
    further: bool = False,
) -> None:
    """Set `adaptor` into `layer`; `seam` (the model or its encoder) will plan its forwards.

    Args:
        generates: the seam is a model whose `generate` is to be edited; it has transformers'
            `prepare_inputs_for_generation`.
        further: other layers of the model carry adaptors already, beside which this one comes.

    Raises:
        ValueError: the layer carries an adaptor already, or lies in one that does or round it; or
            the model does, and `further` is False.
    """
    if is_attached(layer):
        raise ValueError("the layer must not carry an adaptor already; detach that one first")
    others = [module for module in model.modules() if is_attached(module)]
    if others and not further:
        raise ValueError("the model must not carry an adaptor already; detach that one first")
    layers = [module for module in others if isinstance(module, GraceLayer)]
    if any(_is_within(layer, other) or _is_within(other, layer) for other in layers):
        raise ValueError(
            "layer must lie beside the layers that carry an adaptor already, got one inside "
            "another, whose answer replaces that of the inner one"
        )
    _meet(adaptor, [module.__dict__["grace"] for module in layers])
    adaptor.place = place_of(layer, seam)
    if seam.__dict__.get("grace") is not None:
        seam.__dict__[_FURTHER] = (*seam.__dict__.get(_FURTHER, ()), adaptor)
        _swap(layer, GraceLayer, adaptor)
        return
    swaps: list[tuple[nn.Module, type]] = [
        (layer, GraceLayer),
        (seam, GraceGenerator if generates else GraceSeam),
    ]
    for module, mixin in swaps:
        _swap(module, mixin, adaptor)


def _swap(module: nn.Module, mixin: type, adaptor: GraceAdaptor) -> None:
    own = module.__dict__.get("forward")
    module.__dict__["grace"] = adaptor
    if own is not None:
        # accelerate and others set forward on the instance, where it would shadow the class.
        wrap = _adapt_output if mixin is GraceLayer else _planned_forward
        module.__dict__["forward"] = InstanceForward(wrap, module, own)
    base: Any = getattr(type(module), "grace_base", type(module))
    module.__class__ = _swapped(mixin, base)


def _stay_in_place(seam: nn.Module, adaptor: GraceAdaptor) -> None:
    """Move the adaptor to the module that has taken the place of its layer, if one has."""
    module = newcomer(seam, adaptor.place, adaptor)
    if module is not None:
        others = adaptor.others
        detach(module)  # what it holds of the old one, or a copy
        adaptor.others = others
        _swap(module, GraceLayer, adaptor)


def _is_within(module: nn.Module, outer: nn.Module) -> bool:
    return any(inner is module for inner in outer.modules())


def _meet(adaptor: GraceAdaptor, others: list[GraceAdaptor]) -> None:
    """Let the adaptors of a model know of one that comes, and it of them."""
    adaptor.others = tuple(others)
    for other in others:
        other.others = (*other.others, adaptor)


def detach(model: nn.Module, adaptor: GraceAdaptor | None = None) -> None:
    """Give every module of `model` its own class and forward back.

    Args:
        adaptor: the one to take out; None: those of all layers.
    """
    for module in model.modules():
        if not is_attached(module):
            continue
        carried = (module.__dict__["grace"], *module.__dict__.pop(_FURTHER, ()))
        left = [each for each in carried if adaptor is not None and each is not adaptor]
        for each in carried:
            stay = each.others if each in left else ()
            each.others = tuple(other for other in stay if other is not adaptor)
        if left:
            module.__dict__["grace"] = left[0]
            if left[1:]:
                module.__dict__[_FURTHER] = tuple(left[1:])
            continue
        module.__class__ = type(module).grace_base
        del module.__dict__["grace"]
        own = module.__dict__.get("forward")
        if isinstance(own, InstanceForward):
            module.__dict__["forward"] = own.forward
        own = module.__dict__.get("prepare_inputs_for_generation")
        if isinstance(own, _InstancePrepare):
            module.__dict__["prepare_inputs_for_generation"] = own.prepare


def shadowed(model: nn.Module) -> list[str]:
    """Return the names of attached modules whose forward something else has replaced since.

    `generate`, of a model whose own was replaced: its forwards are then planned one by one.
    """
    found = []
    for name, module in model.named_modules():
        if not is_attached(module):
            continue
        own = module.__dict__
        if "forward" in own and not isinstance(own["forward"], InstanceForward):
            found.append(name or type(module).__name__)
        if "generate" in own and isinstance(module, GraceGenerator):
            found.append(f"{name}.generate" if name else "generate")
    return found


class InstanceForward:
    """An instance-level forward with the adaptor round it."""

    def __init__(self, wrap: Callable[..., Any], module: nn.Module, forward: Any) -> None:
        self.wrap, self.module, self.forward = wrap, module, forward
        functools.update_wrapper(self, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrap(self.module, self.forward, args, kwargs)


def _adapt_output(layer: Any, forward: Any, args: Any, kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    adaptor: GraceAdaptor | None = layer.__dict__.get("grace")
    if adaptor is None:
        return output
    if not torch.compiler.is_compiling() and not adaptor.inside:
        # Activation checkpointing runs the layer once more, from within backward.
        again = adaptor.recall()
        if again is not None:
            with adaptor.using(enabled=True, plan=again.plan, forced=again.forced, captures=None):
                return _replace(adaptor, args, kwargs, output)
    return output if adaptor.plan is None else _replace(adaptor, args, kwargs, output)


def _replace(adaptor: GraceAdaptor, args: Any, kwargs: Any, output: Any) -> Any:
    source = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(source, Tensor) or not isinstance(hidden, Tensor):
        raise ValueError(
            "layer must take a tensor and return one, or a tuple that begins with one, got "
            f"{type(source).__name__} in and {type(hidden).__name__} out"
        )
    adapted = adaptor(source, hidden)
    return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


def _planned_forward(seam: Any, forward: Any, args: Any, kwargs: Any) -> Any:
    adaptor: GraceAdaptor | None = seam.__dict__.get("grace")
    packed: PackedPlan | None = kwargs.pop(PLAN, None)
    if adaptor is None:
        return forward(*args, **kwargs)
    if not torch.compiler.is_compiling() and adaptor.generation is None:
        for each in (adaptor, *seam.__dict__.get(_FURTHER, ())):
            _stay_in_place(seam, each)
    if packed is not None:
        return _packed_forward(adaptor, packed, forward, args, kwargs)
    return _by_each(seam, _plan_and_run, forward, args, kwargs)


def _plan_and_run(
    seam: Any, adaptor: GraceAdaptor, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    before = plan = adaptor.plan
    if adaptor.active and before is None:
        generation = adaptor.generation
        if generation is not None and generation.prepared:
            generation.prepared = False
            plan = generation.plan
        elif generation is None or adaptor.forced is None:
            plan = plan_forward(
                adaptor,
                _arguments(seam, args, kwargs),
                takes_positions="position_ids" in type(seam).grace_arguments
                and isinstance(seam, GraceGenerator),
            )
    if torch.compiler.is_compiling():
        return _run_planned(adaptor, plan, before, forward, args, kwargs)
    inside, start = adaptor.inside, next_node_number()
    adaptor.inside = True
    try:
        return _run_planned(adaptor, plan, before, forward, args, kwargs)
    finally:
        adaptor.inside = inside
        adaptor.remember(start, plan if adaptor.active else None)


def _run_planned(
    adaptor: GraceAdaptor, plan: Any, before: Any, forward: Any, args: Any, kwargs: Any
) -> Any:
    if plan is before:
        return forward(*args, **kwargs)
    adaptor.plan = plan
    try:
        return forward(*args, **kwargs)
    finally:
        adaptor.plan = before


def _packed_forward(
    adaptor: GraceAdaptor, plan: PackedPlan, forward: Any, args: Any, kwargs: Any
) -> Any:
    before, enabled, inside = adaptor.plan, adaptor.enabled, adaptor.inside
    # enabled: a request ends as it began, whatever other threads switch off meanwhile.
    adaptor.plan, adaptor.enabled, adaptor.inside = None if plan.empty else plan, True, True
    try:
        return forward(*args, **kwargs)
    finally:
        adaptor.plan, adaptor.enabled, adaptor.inside = before, enabled, inside


def _arguments(seam: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    if not args:
        return kwargs
    return {**dict(zip(type(seam).grace_arguments, args, strict=False)), **kwargs}
