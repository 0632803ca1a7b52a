"""Training in processes of its own: `ranks` starts one a device and serves them, `nodes` ties the parents of several
nodes together, `worker` is what a process runs. No torchrun: its agent kills after 30 s and exits 1 after a clean save.
"""
