"""Training processes, and the parent that serves them.

`ranks` starts one process per device, `worker` is their program, and `training` is the loop of the
parent. `state` holds what the parent knows. `nodes` and `coordination` connect the parents of
several nodes.

torchrun is not used by default: it exits with 1 even after all processes have saved and stopped,
and after the failure of one process it waits up to 30 s for the others; see docs/decisions/0006.
`external` takes the processes that torchrun or another launcher has started.
"""
