"""One spelling per operation, so that later passes stay short.

Before (a Hugging Face GPT-2 MLP)::

    %view = view(%ln_2, [-1, 64])
    %addmm = addmm(c_fc.bias, %view, c_fc.weight)          # Conv1D: weight [in, out]
    %view_1 = view(%addmm, [%b, %l, 256])
    %mul = mul(%view_1, 0.5);  %pow = pow(%view_1, 3.0);  ...;  %tanh = tanh(...);  ...     # gelu, tanh form

After::

    %h_0_mlp_c_fc = linear(%h_0_ln_2, mlp.c_fc.weight, mlp.c_fc.bias)
    %h_0_mlp_act = gelu(%h_0_mlp_c_fc, approximate='tanh')

Likewise every spelling of RMSNorm becomes one ``rms_norm``, of causal softmax attention one ``ntc::attention``, and a fused projection
three linears for queries, keys and values, two for a gate and what it gates: SwiGLU is ``linear, silu, linear, mul, linear``. A spelling
that is not recognized is left as it is and reported with the reason; nothing is guessed: each rewrite is proved by running both sides
on small tensors (``ntc.probe``).
"""
from __future__ import annotations

from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import where
from ntc.ops import aten
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc_passes.canonicalize.activations import rewrite_activations
from ntc_passes.canonicalize.attention import SOFTMAX, over_tokens, rewrite_attention
from ntc_passes.canonicalize.fused import split_fused_projections
from ntc_passes.canonicalize.layouts import drop_identity_layouts, drop_no_ops, views_to_reshapes, writes_to_results
from ntc_passes.canonicalize.linears import rewrite_linears, take_in_biases
from ntc_passes.canonicalize.making import NAME
from ntc_passes.canonicalize.names import tidy_names
from ntc_passes.canonicalize.norms import rewrite_norms

__all__ = ["Canonicalize"]


class Canonicalize(Pass):
    """Bring every spelling of an operation to one small dialect."""

    name = NAME
    requires = frozenset({"captured"})
    provides = frozenset({"canonical"})
    exact = True

    def run(self, program: Program, context: Context) -> PassResult:
        """Apply the rules in order; each leaves a program that computes the same."""
        sites, missed = 0, list[tuple[Node, str]]()
        # Writes and views first: a view is only valid on the strides that the copies gave it, and copies are dropped next.
        for rule in (writes_to_results, views_to_reshapes, drop_no_ops, drop_identity_layouts):
            sites += rule(program)
        for rule in (rewrite_linears, drop_identity_layouts, take_in_biases, rewrite_activations):
            sites += rule(program)
        norms, no_norms = rewrite_norms(program)
        sites, missed = sites + norms, [*missed, *no_norms]
        for node in list(program.graph.nodes):
            if (node.target in SOFTMAX and over_tokens(node)) or node.target is aten.scaled_dot_product_attention.default:
                reason = rewrite_attention(program, node)
                if reason and node.target not in SOFTMAX:
                    raise PassError(f"scaled_dot_product_attention at {where(node)} is no causal attention that ntc knows: {reason}")
                if reason:
                    missed.append((node, reason))
                else:
                    sites += 1
        sites += drop_identity_layouts(program)
        sites += split_fused_projections(program)
        program.graph.eliminate_dead_code()
        sites += tidy_names(program)
        return PassResult(modified=sites > 0, sites=sites, missed=tuple((node.name, reason) for node, reason in missed))
