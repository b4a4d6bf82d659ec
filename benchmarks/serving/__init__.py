"""One server for all tasks against the frozen base, merged weights, PEFT and a process per task, on loopback."""
