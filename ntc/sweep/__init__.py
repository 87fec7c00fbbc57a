"""Quality against energy over settings, and which of them no other beats in both (docs/sweep.md).

Every setting is compiled, evaluated and counted on the same tokens; compiled folders, fine-tuned ones for instance, can stand beside
them as they are. What is measured is written down point by point: a sweep that was stopped goes on.

============  ====================================================================================
module        what
============  ====================================================================================
``plan``      settings, grids of them, and what all points share
``bench``     compiles and measures one setting, or many in several processes
``points``    what is kept of an earlier sweep
``front``     which points no other dominates, as a table and as a picture
``run``       puts it together
``document``  the same as one HTML page, with ``chart``, its picture
============  ====================================================================================
"""

from ntc.sweep.front import dominating as dominating
from ntc.sweep.plan import COSTS as COSTS
from ntc.sweep.plan import Plan as Plan
from ntc.sweep.plan import Setting as Setting
from ntc.sweep.plan import grid as grid
from ntc.sweep.run import sweep as sweep

__all__ = ["COSTS", "Plan", "Setting", "dominating", "grid", "sweep"]
