"""What processes cost: processor time and memory of a process and all its children, as the operating system counts."""

from collections.abc import Iterable

import psutil

__all__ = ["connected_ports", "memory", "processor_seconds", "tree"]


def tree(pid: int) -> list[int]:
    """Return the ids of a process and of all that descend from it."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def processor_seconds(pids: Iterable[int]) -> float:
    """Return the user and system time that these processes have taken so far; those that have ended count nothing."""
    total = 0.0
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total += times.user + times.system
    return total


def memory(pids: Iterable[int]) -> int:
    """Return the resident bytes of these processes now."""
    total = 0
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def connected_ports(pids: Iterable[int]) -> set[int]:
    """Return the ports at the other end of these processes' TCP connections."""
    found: set[int] = set()
    for pid in pids:
        try:
            connections = psutil.Process(pid).net_connections("tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found.update(each.raddr.port for each in connections if each.raddr and each.status == psutil.CONN_ESTABLISHED)
    return found
