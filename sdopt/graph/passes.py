"""The graph passes, as one ordered tuple: what is done to a traced graph, and in which order, is read off `PASSES`.

No pass reads a weight: they have no data while the passes run. That keeps the linear layers' `Transpose` nodes in the
graph (runtimes absorb them when they load it), and the weight file exactly the checkpoint's tensors.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

# Shapes, scalars and the time embedding's frequencies; a folded tensor of this many elements is still no weight.
_FOLD_LIMIT_ELEMENTS = 4096

_REWRITE_RULES = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.cast_cast_rule,
    rules.reshape_reshape_rule,
    rules.slice_split_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
)


def _folds(node: ir.Node) -> bool | None:
    """Never fold over a weight; leave the rest to the pass's own rules."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.const_value is None:
            return False
    return None


_FOLD_CONSTANTS = FoldConstantsPass(
    shape_inference=True,
    input_size_limit=_FOLD_LIMIT_ELEMENTS,
    output_size_limit=_FOLD_LIMIT_ELEMENTS,
    should_fold=_folds,
)

# Folding runs twice: the rewrites leave new constants behind.
PASSES: tuple[ir.passes.PassBase, ...] = (
    common.InlinePass(),
    _FOLD_CONSTANTS,
    RewritePass(_REWRITE_RULES),
    common.RemoveUnusedNodesPass(),
    _FOLD_CONSTANTS,
    common.IdentityEliminationPass(),
    common.CommonSubexpressionEliminationPass(),
    common.RemoveUnusedNodesPass(),
    common.RemoveUnusedFunctionsPass(),
    common.RemoveUnusedOpsetsPass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.ClearMetadataAndDocStringPass(),
    common.OutputFixPass(),
    common.NameFixPass(),
    common.TopologicalSortPass(),
)


def run_passes(model: ir.Model) -> None:
    """Run `PASSES` in order, in place."""
    for graph_pass in PASSES:
        graph_pass(model)
