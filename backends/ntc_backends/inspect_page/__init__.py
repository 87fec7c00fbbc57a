"""``ntc inspect``: one HTML page on which a spiking network can be looked at.

=================  ==============================================================================================
module             what
=================  ==============================================================================================
``command``        the command line
``subject``        what is inspected: a compiled folder, or a netlist alone
``flow``           elements and host ops as boxes with edges; the residual stream; sections, one per block
``host_ops``       what a host op is called on the page, and which of them share a box
``layout``         where boxes and edges of a section lie, in two orientations
``picture``        the sections as the template draws them, with sizes and firing rates
``prompt``         a text or token ids to run
``activity``       runs the program and keeps spikes
``membranes``      the neurons' dynamics once more, for a few of them, with the membrane kept
``records``        tables: populations, passes, verification, widths, provenance
``document``       puts the page together
``page/``          template, style sheet and script
=================  ==============================================================================================

The page loads nothing: its content security policy forbids every request, and every script but its own.
"""
