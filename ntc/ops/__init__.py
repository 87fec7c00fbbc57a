"""The ops of the dialect: importing this registers them with torch and with the compiler."""

from ntc.ops.aten import aten as aten
from ntc.ops.attention import attention as attention
from ntc.ops.attention import attention_stream as attention_stream
from ntc.ops.coded_attention import coded_attention as coded_attention
from ntc.ops.coded_scores import coded_scores as coded_scores
from ntc.ops.coded_values import coded_values as coded_values
from ntc.ops.coded_values import key_scale as key_scale
from ntc.ops.decode import decode as decode
from ntc.ops.digit_neuron import digit_neuron as digit_neuron
from ntc.ops.encode import encode as encode
from ntc.ops.encode import token_step as token_step
from ntc.ops.expectation import expectation as expectation
from ntc.ops.from_integer import from_integer as from_integer
from ntc.ops.fs_neuron import fs_neuron as fs_neuron
from ntc.ops.fs_neuron import fs_synapse as fs_synapse
from ntc.ops.hadamard import hadamard as hadamard
from ntc.ops.if_neuron import integrate_fire as integrate_fire
from ntc.ops.if_rate import if_rate as if_rate
from ntc.ops.integer_attention import integer_attention as integer_attention
from ntc.ops.integer_attention import integer_attention_stream as integer_attention_stream
from ntc.ops.integer_fire import integer_fire as integer_fire
from ntc.ops.integer_linear import integer_linear as integer_linear
from ntc.ops.integer_lookup import integer_lookup as integer_lookup
from ntc.ops.integer_norm import integer_norm as integer_norm
from ntc.ops.interval import Bound as Bound
from ntc.ops.interval import Inside as Inside
from ntc.ops.interval import Interval as Interval
from ntc.ops.lif_neuron import leaky_integrate_fire as leaky_integrate_fire
from ntc.ops.mt_neuron import mt_neuron as mt_neuron
from ntc.ops.open_attention import causal_scores as causal_scores
from ntc.ops.open_attention import weighted_values as weighted_values
from ntc.ops.position_scale import position_scale as position_scale
from ntc.ops.requantize import requantize as requantize
from ntc.ops.rms_scale import rms_scale as rms_scale
from ntc.ops.row_sum_scale import row_sum_scale as row_sum_scale
from ntc.ops.row_sum_scale import row_sum_scale_stream as row_sum_scale_stream
from ntc.ops.spec import SPECS as SPECS
from ntc.ops.spec import Counts as Counts
from ntc.ops.spec import Operand as Operand
from ntc.ops.spec import OpSpec as OpSpec
from ntc.ops.spec import Traffic as Traffic
from ntc.ops.spec import TypeMismatch as TypeMismatch
from ntc.ops.spec import register as register
from ntc.ops.spec import spec_of as spec_of
from ntc.ops.spec import timed as timed
from ntc.ops.spike_linear import spike_linear as spike_linear
from ntc.ops.spiking_attention import spiking_attention as spiking_attention
from ntc.ops.spiking_attention import spiking_attention_stream as spiking_attention_stream
from ntc.ops.train_product import train_product as train_product
from ntc.ops.windowed_attention import SOFTMAX_ATTENTION as SOFTMAX_ATTENTION
from ntc.ops.windowed_attention import windowed_attention as windowed_attention

__all__ = [
    "SOFTMAX_ATTENTION", "SPECS", "Bound", "Counts", "Inside", "Interval", "OpSpec", "Operand", "Traffic", "TypeMismatch", "aten",
    "attention", "causal_scores", "coded_attention", "coded_scores", "coded_values", "decode", "digit_neuron", "encode", "expectation",
    "from_integer", "fs_neuron", "fs_synapse", "hadamard", "if_rate", "integer_attention", "integer_attention_stream", "integer_fire",
    "integer_linear", "integer_lookup", "integer_norm", "integrate_fire", "key_scale", "leaky_integrate_fire", "mt_neuron",
    "position_scale", "register", "requantize", "rms_scale", "row_sum_scale", "spec_of", "spike_linear", "spiking_attention",
    "spiking_attention_stream", "timed", "token_step", "train_product", "weighted_values", "windowed_attention",
]  # fmt: skip
