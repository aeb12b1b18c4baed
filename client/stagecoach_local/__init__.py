"""A whole cluster on this machine, in child processes that can be kept running.

What is to be done is decided purely: the layer ranges (layer_split), the processes (plan) and their command lines
(commands), what an exit status and last words mean (process_exit), and whether a dead process is started again
(restarts). Three files act on it: child_process runs one process, supervisor watches several, and local_cluster starts
and stops them all.

>>> from stagecoach_client import Client
>>> from stagecoach_local import LocalCluster
>>> with LocalCluster("models/smollm2-135m-instruct", stages=2) as cluster, Client(cluster.address) as client:
...     print(client.generate("The capital of France is", max_tokens=8).text)
"""

from stagecoach_local.local_cluster import ClusterProcess, LocalCluster
from stagecoach_local.process_exit import ProcessDied, ProcessExit

__all__ = ["ClusterProcess", "LocalCluster", "ProcessDied", "ProcessExit"]
