"""``conadv watch``: a run, or a folder of runs, as it goes. Reads only files; the run does not know of it.

``follow`` reads a record as it grows, ``state`` keeps what is to be shown, ``view`` and ``many`` draw one frame.
"""
