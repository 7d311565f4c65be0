//! A VM without a guest's kernel: programs that stand for QEMU, whose monitor answers, and for the vsock device. Both outlive
//! their server, as the real ones do.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Takes one connection after another on the monitor that listens by the descriptor of its arguments, and says that the
/// guest runs, whatever it is asked.
const QEMU: &str = r#"
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void converse(FILE *in, int out) {
    char line[4096];
    dprintf(out, "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n");
    while (fgets(line, sizeof line, in)) {
        char *id = strstr(line, "\"id\":");
        dprintf(out, "{\"return\": {\"status\": \"running\"}, \"id\": %d}\n", id ? atoi(id + 5) : 0);
    }
}

int main(int argc, char **argv) {
    int monitor = -1;
    /* Asked for its version, to see whether it starts at all. */
    if (argc < 3)
        return puts("QEMU emulator version 0.0.0 (none)") < 0;
    signal(SIGPIPE, SIG_IGN);
    for (int i = 1; i < argc; i++)
        sscanf(argv[i], "socket,id=qmp,fd=%d,server=on", &monitor);
    for (;;) {
        int line = monitor < 0 ? -1 : accept(monitor, NULL, NULL);
        if (line < 0) {
            pause();
            continue;
        }
        converse(fdopen(line, "r"), line);
        close(line);
    }
}
"#;

/// Listens on the socket `vu` in its working directory, which is all that QEMU's start waits for.
const DEVICE: &str = r#"
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv) {
    struct sockaddr_un here = { .sun_family = AF_UNIX, .sun_path = "vu" };
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (argc < 3)
        return 0;
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 8))
        return 1;
    for (;;)
        pause();
}
"#;

/// Makes them in a directory: QEMU, and the device.
pub fn programs(dir: &Path) -> [PathBuf; 2] {
    [("qemu", QEMU), ("device", DEVICE)].map(|(name, text)| {
        let (source, program) = (dir.join(format!("{name}.c")), dir.join(name));
        std::fs::write(&source, text).unwrap();
        let mut gcc = Command::new("gcc");
        gcc.args(["-static", "-O1", "-Wall", "-o"]).arg(&program).arg(&source);
        assert!(gcc.status().unwrap().success());
        program
    })
}
