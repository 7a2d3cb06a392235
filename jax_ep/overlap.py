"""``overlap=True``: calls that XLA may run beside computation that does not depend on them.

Such a call is lowered to a function of its own, which is called with XLA's annotation for its
stream of collectives. XLA:GPU makes an asynchronous start and a done of that, and its scheduler
puts between the two what it finds; on the stream the calls, and XLA's own collectives, run one
after the other. What a call reads and writes is its own from start to done, in XLA's books.

- A function, for XLA fuses a bare custom call with slices of its operands and forgets the
  annotation.
- All its results pass one barrier. XLA gives the annotation to each result of a call that has
  several, and would make an asynchronous operation of each; but a tuple of all results, which is
  what the barrier takes, it simplifies to the call itself. A result that nothing uses leaves the
  barrier: those that are often unused are therefore joined to one that is not. Where one is all the
  same, results are right, but less runs beside other work.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func, stablehlo

_ANNOTATIONS = {"_xla_stream_annotation": "collective", "inlineable": "false"}

# Of each program that is being lowered, by its MLIR module: whether its calls overlap.
_programs: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def require_agreement(ctx: Any, where: str, overlap: bool) -> None:
    """All calls of a program overlap, or none.

    Calls on two streams would run at once, but share their device's control memory.

    Raises:
        ValueError: a call before was the other way.
    """
    if _programs.setdefault(ctx.module_context.module, overlap) != overlap:
        raise ValueError(
            f"{where}: this layout has overlap={overlap}, but another one of the same program has "
            f"overlap={not overlap}: pass the same to all of them, or change a layout "
            "of another program: dataclasses.replace(layout, overlap=.., num_sms=..)"
        )


def target(name: str) -> str:
    """The target of such a call; ``name`` is that of others.

    XLA may not record it in command buffers: before jaxlib 0.12 they run it and what is beside it
    one after the other; since then at once, but then also two calls that are in flight together
    (with ``--xla_gpu_experimental_parallel_collective_overlap_limit``), which elsewhere are in
    the order of their stream.
    """
    return f"{name}_overlapped"


def lower(
    ctx: Any,
    name: str,
    call: Callable[..., Sequence[Any]],
    operands: Sequence[Any],
    joined: Sequence[int] = (),
) -> Sequence[Any]:
    """What ``call(*operands)`` lowers to, in a function of this name that is asynchronous.

    Results ``joined``, by their numbers, which follow one another and are vectors of one type,
    leave it as one, which is used if any of them is.
    """
    module = ctx.module_context.module
    types = [operand.type for operand in operands]
    with ir.InsertionPoint(module.body):
        function = func.FuncOp(name, ir.FunctionType.get(types, []))
    function.attributes["sym_visibility"] = ir.StringAttr.get("private")
    with ir.InsertionPoint(function.add_entry_block()):
        results = list(call(*function.arguments))
        parts = [results[i] for i in joined]
        if parts:
            results[joined[0] : joined[-1] + 1] = [_join(parts)]
        func.ReturnOp(results)
    result_types = [result.type for result in results]
    signature = ir.FunctionType.get(types, result_types)
    function.attributes["function_type"] = ir.TypeAttr.get(signature)
    ctx.module_context.symbol_table.insert(function)  # which makes its name unique
    symbol = ir.FlatSymbolRefAttr.get(function.name.value)
    called = func.CallOp(result_types, symbol, list(operands))
    called.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(
        {key: ir.StringAttr.get(value) for key, value in _ANNOTATIONS.items()}
    )
    results = list(called.results)
    if len(results) > 1:
        results = list(stablehlo.OptimizationBarrierOp(results).results)
    if parts:
        results[joined[0] : joined[0] + 1] = _split(results[joined[0]], [p.type for p in parts])
    return results


def _join(vectors: Sequence[Any]) -> Any:
    element_type = vectors[0].type.element_type
    size = sum(vector.type.shape[0] for vector in vectors)
    joined = ir.RankedTensorType.get([size], element_type)
    return stablehlo.ConcatenateOp(vectors, 0, results=[joined]).result


def _split(joined: Any, types: Sequence[Any]) -> list[Any]:
    ends = list(itertools.accumulate(vector.shape[0] for vector in types))
    begins = [0, *ends[:-1]]
    return [
        stablehlo.slice(joined, *map(ir.DenseI64ArrayAttr.get, ([begin], [end], [1])))
        for begin, end in zip(begins, ends, strict=True)
    ]
