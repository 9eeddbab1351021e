"""Simulated worlds: they write LeRobot datasets and drive a policy; nothing else knows one."""
