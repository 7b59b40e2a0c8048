"""Set an adaptor into a model by swapping classes, and take it out again.

Three objects of the model change their class and nothing else: the wrapped layer (it hands its
output to the adaptor), the *seam* (the module that sees the attention mask and so knows which rows
ask), and for a causal model the seam is the model itself, whose `generate` is followed too.
Parameters, `state_dict` names, `isinstance` and hooks stay as they are. A new model made from an
attached one's class is a plain one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .adaptor import GraceAdaptor
from .continuous import PLAN, check_served, follow
from .finding import core_of, find_layer
from .forwards import plan_forward, plan_step, prompt_length, warn_later_turn, whole_prefill
from .packed import PackedPlan
from .place import newcomer, place_of
from .state import Generation
from .swapping import InstanceForward, beneath, rebuild, swap, swap_back, wrapped
from .torch_private import next_node_number

__all__ = ["attach", "core_of", "detach", "find_layer", "is_attached", "shadowed"]

_FURTHER = "grace_further"
"""Where a seam keeps the adaptors of the layers that were attached after the first."""


class GraceLayer:
    """Mixin of the wrapped layer."""

    grace_prefix = "Grace"  # it shows in print(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return wrapped(self, _adapt_output, args, kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Follow the model to its device; an empty probe says where fn moves things. Its dtype is
        # not followed: keys must keep the bits they were made with.
        adaptor: GraceAdaptor | None = self.__dict__.get("grace")
        if adaptor is not None:
            adaptor.move(fn(torch.empty(0, device=adaptor.codebook.keys.device)).device)
        return beneath(self, "_apply")(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (GraceLayer, type(self).grace_base), self.__dict__  # type: ignore[attr-defined]


class GraceSeam:
    """Mixin of the module whose forward sees the mask: plans each forward before it runs."""

    grace_prefix = ""  # transformers writes the name of a model's class into configurations

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return wrapped(self, _planned_forward, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin = GraceGenerator if isinstance(self, GraceGenerator) else GraceSeam
        return rebuild, (mixin, type(self).grace_base), self.__dict__  # type: ignore[attr-defined]


class GraceGenerator(GraceSeam):
    """Mixin of a model that generates: one lookup at the prompt's end, latched for what follows."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        adaptor: GraceAdaptor | None = self.__dict__.get("grace")
        with nullcontext() if adaptor is None else adaptor.at_one_moment():
            return _by_each(self, _generate, beneath(self, "generate"), args, kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        adaptor: GraceAdaptor | None = self.__dict__.get("grace")
        if adaptor is not None and adaptor.active:
            check_served(adaptor)
        manager = beneath(self, "init_continuous_batching")(*args, **kwargs)
        if adaptor is not None:
            follow(manager, self)
        return manager

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        own = beneath(self, "prepare_inputs_for_generation")
        return _by_each(self, _planned_inputs, own, args, kwargs)


def _by_each(module: Any, wrap: Callable[..., Any], own: Any, args: Any, kwargs: Any) -> Any:
    """Call a method of a seam with `wrap` round it, once for each adaptor that it plans for."""
    for adaptor in module.__dict__.get(_FURTHER, ()):
        own = _round(module, wrap, adaptor, own)
    adaptor = module.__dict__.get("grace")
    if adaptor is None:
        return own(*args, **kwargs)
    return wrap(module, adaptor, own, args, kwargs)


def _round(module: Any, wrap: Callable[..., Any], adaptor: GraceAdaptor, own: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return wrap(module, adaptor, own, args, kwargs)

    return run


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
    # An assistant inside generate keeps a cache of its own, and where the value is given nothing is
    # asked of earlier tokens.
    if adaptor.generation is None and adaptor.forced is None:
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
        swap(layer, GraceLayer, _adapt_output, adaptor)
        return
    swap(layer, GraceLayer, _adapt_output, adaptor)
    swap(seam, GraceGenerator if generates else GraceSeam, _planned_forward, adaptor)


def _stay_in_place(seam: nn.Module, adaptor: GraceAdaptor) -> None:
    """Move the adaptor to the module that has taken the place of its layer, if one has."""
    module = newcomer(seam, adaptor.place, adaptor)
    if module is not None:
        others = adaptor.others
        detach(module)  # what it holds of the old one, or a copy
        adaptor.others = others
        swap(module, GraceLayer, _adapt_output, adaptor)


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
        swap_back(module)
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
    if torch.compiler.is_compiling() or adaptor.moments is None:
        return _by_each(seam, _plan_and_run, forward, args, kwargs)
    with adaptor.at_one_moment():
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
