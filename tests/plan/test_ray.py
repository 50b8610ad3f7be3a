"""Tasks of Ray over two local nodes; skipped where Ray is not installed, since nothing else needs it."""

import os

import pytest

from avalab.plan import work

pytest.importorskip("ray", reason="Ray is optional: chains are made in processes without it")


def where(request: dict) -> dict:
    """The node that a task ran on."""
    import time

    import ray

    time.sleep(0.3)
    return {"failed": ray.get_runtime_context().get_node_id()}


@pytest.mark.filterwarnings("ignore")
def test_independent_chains_run_on_two_nodes():
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        nodes = work._by_ray([{}] * 4, where)
        assert len(set(nodes)) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()
