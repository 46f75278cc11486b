"""In the place of an agent that Ray's raylet insists on, where nobody asks it anything: `python -I -S idle_agent.py`.

It says, as Ray's own agent does where Ray is installed without its extras, that its services are not there: a file
for each of their ports, with -1. It ends with the raylet, as that ends with it. Nothing but the standard library.
"""

import os
import select
import sys

NOT_THERE = "-1"


def main(session: str, node_id: str, ports: list[str]) -> None:
    """Writes the files and waits for the end of the raylet, its parent."""
    raylet = int(os.environ["RAY_RAYLET_PID"])
    held = os.pidfd_open(raylet)
    if os.getppid() != raylet:  # it has ended before it was held, and its number may be another's
        return
    for port in ports:
        written = os.path.join(session, f"{port}_{node_id}")
        with open(f"{written}.{os.getpid()}", "w") as file:
            file.write(NOT_THERE)
        os.rename(file.name, written)
    ended = select.poll()
    ended.register(held, select.POLLIN)
    ended.poll()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
