#!/usr/bin/env python3
"""Does for a session what crun does, without a container."""
import array, fcntl, json, os, pty, socket, sys, termios

args = sys.argv[1:]
flag = lambda name: args[args.index(name) + 1] if name in args else None
if args[-2:-1] == ["state"]:
    # Its container has the root of whoever asks.
    print(json.dumps({"pid": os.getppid()}))
    sys.exit(0)
process = json.load(open(flag("--process")))
env = dict(line.split("=", 1) for line in process["env"])
program = process["args"][0]

def complain(words):
    open(flag("--log"), "w").write(json.dumps({"level": "error", "msg": words}) + "\n")
    sys.exit(1)

if program == "missing":
    complain("executable file `missing` not found in $PATH: No such file or directory")
master = slave = None
if process["terminal"]:
    master, slave = pty.openpty()
    size = process["consoleSize"]
    termios.tcsetwinsize(slave, (size["height"], size["width"]))
child = os.fork()
if child == 0:
    os.setsid()
    if slave is not None:
        os.close(master)
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
    os.chdir(process["cwd"])
    os.execvpe(program, process["args"], env)
if slave is not None:
    console = socket.socket(socket.AF_UNIX)
    console.connect(flag("--console-socket"))
    console.sendmsg([b"pty"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))])
    os.close(master)
    os.close(slave)
    console.close()
else:
    for fd in (0, 1, 2):
        os.close(fd)
with open(flag("--pid-file"), "w") as file:
    file.write(str(child))
_, status = os.waitpid(child, 0)
os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
