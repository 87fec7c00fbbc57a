"""Energy of a spiking program against the network that it came from (docs/energy.md).

=================  ==============================================================================================
module             what
=================  ==============================================================================================
``measure``        runs the program on a text and counts
``report``         both networks' counts, and the report as data
``projections``    which linear layers belong to attention
``booking``        under which kind operations are booked: attention products, FFN, encoders, ...
``constants``      energies per operation, tables in ``ntc/data/energy``
``hierarchy``      energies of moving data, tables in ``ntc/data/memory``
``numbers``        numbers with a low and a high value, and reading tables
``pricing``        joules of counts: by arithmetic alone, and with memory
``baselines``      the original in other arithmetics; where both cost the same
``sensitivity``    how far a figure rests on its constants
``headline``       the report in two sentences
``document``       the report as one HTML page, with ``bars`` and ``wording``
=================  ==============================================================================================
"""

from ntc.energy.constants import Constants as Constants
from ntc.energy.constants import list_constants as list_constants
from ntc.energy.constants import load_constants as load_constants
from ntc.energy.hierarchy import Memory as Memory
from ntc.energy.hierarchy import list_memories as list_memories
from ntc.energy.hierarchy import load_memory as load_memory
from ntc.energy.measure import count_by_distinct_shape as count_by_distinct_shape
from ntc.energy.measure import measure_energy as measure_energy
from ntc.energy.pricing import Pricing as Pricing
from ntc.energy.projections import attention_projections as attention_projections
from ntc.energy.report import EnergyReport as EnergyReport
from ntc.energy.report import Side as Side

__all__ = [
    "Constants", "EnergyReport", "Memory", "Pricing", "Side", "attention_projections", "count_by_distinct_shape", "list_constants",
    "list_memories", "load_constants", "load_memory", "measure_energy",
]  # fmt: skip
