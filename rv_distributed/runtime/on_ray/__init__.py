"""The Ray runtime: worker actors, one a GPU or a few CPUs each.

Nothing else imports ray, but for the job server of `rv submit` and the tasks of `rv eval`, a module each.

Tensor bytes never pass through the driver, nor through Ray's object store: a call carries a `PieceTask` and brings
back a `PieceResult`.
"""

from rv_distributed.runtime.on_ray.runtime import RayRuntime

__all__ = ["RayRuntime"]
