"""A Kiln server as hypeman's SDK for Python finds it: nothing here knows Kiln but by the SDK's own methods.

HYPEMAN_BASE_URL and HYPEMAN_API_KEY, which the SDK reads itself, say where and as whom. The one argument is a source archive
with a Dockerfile that builds, and busybox.
"""

import pathlib
import re
import sys
from datetime import timedelta

import hypeman
from hypeman import Hypeman

SOURCE = pathlib.Path(sys.argv[1])

# Dockerfiles that are sent beside the archive.
BUSYBOX = "FROM scratch\nCOPY --chmod=755 busybox /bin/busybox\n"
FAILS = BUSYBOX + 'RUN ["/bin/busybox", "sh", "-c", "echo last words; exit 7"]\n'
WAITS = BUSYBOX + 'RUN ["/bin/busybox", "sh", "-c", "echo waiting; exec /bin/busybox sleep 100000"]\n'

# Every answer is held against the SDK's own models: a required field that is missing, or one of another type, raises.
client = Hypeman(_strict_response_validation=True)
# But for events: Kiln has more types of them than hypeman, which the SDK hands out as they are where it is not told to be strict.
events = Hypeman().builds.events


def ok(what):
    print("OK", what, flush=True)


def refused(error, code, call):
    """Checks that a call raises the SDK's exception of that kind, with Kiln's code in its body."""
    try:
        call()
    except error as e:
        assert e.body["code"] == code and e.body["message"], e.body
    else:
        raise AssertionError(f"{error.__name__} was not raised")


def submit(kind, **more):
    tags = f'{{"sdk": "python", "kind": "{kind}"}}'
    build = client.builds.create(source=SOURCE, tags=tags, cpus=1, timeout_seconds=300, **more)
    assert build.status == "queued" and build.tags == {"sdk": "python", "kind": kind}, build
    assert build.queue_position is None or build.queue_position >= 1, build
    assert build.started_at is None and build.image_digest is None and build.error is None, build
    return build


def follow(build, each=lambda event: None):
    """Every event of a build to the end of the stream: its statuses, and its lines."""
    statuses, lines = [], []
    for event in events(build.id, follow=True):
        assert event.timestamp >= build.created_at - timedelta(seconds=1), event
        if event.type == "status":
            statuses.append(event.status)
        elif event.type == "log":
            lines.append(event.content)
        each(event)
    # Without follow it is what is stored, which is the same: heartbeats are not kept.
    stored = [event for event in events(build.id)]
    assert statuses == [event.status for event in stored if event.type == "status"]
    assert lines == [event.content for event in stored if event.type == "log"]
    return statuses, lines


def ended(build):
    assert build.completed_at >= build.started_at >= build.created_at, build
    took = build.completed_at - build.started_at
    assert build.duration_ms == took // timedelta(milliseconds=1), build
    assert re.fullmatch("sha256:[0-9a-f]{64}", build.provenance.source_hash), build
    assert build.provenance.timestamp == build.completed_at and build.queue_position is None, build


def a_build_that_is_ready(build):
    statuses, lines = follow(build)
    assert statuses == ["queued", "building", "pushing", "ready"], statuses
    assert "built by a step" in lines, lines
    build = client.builds.get(build.id)
    ended(build)
    assert build.status == "ready" and build.error is None, build
    assert re.fullmatch("sha256:[0-9a-f]{64}", build.image_digest), build
    assert build.image_ref.endswith(f"/dev/sdk/python@{build.image_digest}"), build
    assert build.provenance.lockfile_hashes == {}, build
    ok("a build is ready")
    return build


def a_build_that_fails(build):
    statuses, lines = follow(build)
    assert statuses == ["queued", "building", "failed"], statuses
    assert "last words" in lines, lines
    build = client.builds.get(build.id)
    ended(build)
    assert build.status == "failed" and build.image_digest is None and build.image_ref is None, build
    assert "step 1" in build.error and "exit code 7" in build.error, build.error
    ok("a failed build names its step and exit code: " + build.error)


def a_build_that_is_cancelled(build):
    def cancel(event):
        if event.type == "log" and event.content == "waiting":
            assert client.builds.get(build.id).status == "building"
            client.builds.cancel(build.id)

    statuses, _ = follow(build, cancel)
    assert statuses == ["queued", "building", "cancelled"], statuses
    final = client.builds.get(build.id)
    ended(final)
    assert final.status == "cancelled" and final.image_digest is None, final
    refused(hypeman.ConflictError, "finished", lambda: client.builds.cancel(build.id))
    ok("a running build is cancelled, once")


def lists(ready, failed, cancelled):
    def ids(**asked):
        return [build.id for build in client.builds.list(**asked)]

    mine = {"sdk": "python"}
    assert ids(tags=mine) == [cancelled.id, failed.id, ready.id]
    assert ids(tags={**mine, "kind": "fails"}) == [failed.id]
    assert ids(tags={"sdk": "another"}) == []
    # Kiln's own parameters, as the SDK sends what it does not know.
    assert ids(tags=mine, extra_query={"status": "ready"}) == [ready.id]
    assert ids(extra_query={"limit": 1}) == [cancelled.id]
    ok("builds are listed by tags and status")


def refusals():
    nobody = "00000000-0000-7000-8000-000000000000"
    for call in (client.builds.get, client.builds.cancel, events, client.instances.get, client.instances.delete):
        refused(hypeman.NotFoundError, "not_found", lambda: call(nobody))
    refused(hypeman.BadRequestError, "invalid_source", lambda: client.builds.create(source=b"no archive"))
    refused(hypeman.UnprocessableEntityError, "invalid_field", lambda: client.builds.create(source=SOURCE, cpus=0))
    stranger = client.with_options(api_key="kiln_of_nobody")
    refused(hypeman.AuthenticationError, "unauthorized", stranger.builds.list)
    ok("refusals are the SDK's exceptions")


def an_instance(image):
    made = client.instances.create(
        image=image, name="sdk-python", env={"GREETING": "hello"}, vcpus=1, size="512MB"
    )
    assert made.name == "sdk-python" and made.image == image and made.vcpus == 1 and made.size == "512MB", made
    assert made.state in ("Created", "Initializing", "Running"), made
    again = dict(image=image, name="sdk-python")
    refused(hypeman.ConflictError, "name_taken", lambda: client.instances.create(**again))
    # Closed here: one that is left open is closed by the garbage collector, which waits for ever where httpcore holds its lock.
    with client.instances.logs(made.id, follow=True) as lines:
        assert "hello" in lines
    running = client.instances.get(made.id)
    assert running.state == "Running" and running.started_at >= running.created_at, running
    assert running.exit_code is None and running.stopped_at is None, running
    assert made.id in [instance.id for instance in client.instances.list()]
    client.instances.delete(made.id)
    refused(hypeman.NotFoundError, "not_found", lambda: client.instances.get(made.id))
    ok("an instance of the built image ran and is gone")


assert client.health.check().status == "ok"
ok("it is well")
refusals()
# Two at one time, and the third once the first has gone.
first = submit("ready", image_name="sdk/python")
second = submit("fails", dockerfile=FAILS)
third = submit("waits", dockerfile=WAITS)
ready = a_build_that_is_ready(first)
a_build_that_fails(second)
a_build_that_is_cancelled(third)
lists(first, second, third)
an_instance(ready.image_ref)
