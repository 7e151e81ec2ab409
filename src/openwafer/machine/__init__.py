"""The wafer as data: `Machine` and the specifications that ship with the package."""

from openwafer.machine.spec import Machine, Rates, load_machine, machine_names

__all__ = ["Machine", "Rates", "load_machine", "machine_names"]
