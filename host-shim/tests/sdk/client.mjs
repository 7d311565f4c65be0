// A Kiln server as hypeman's SDK for Node finds it: nothing here knows Kiln but by the SDK's own methods.
//
// HYPEMAN_BASE_URL and HYPEMAN_API_KEY, which the SDK reads itself, say where and as whom. The one argument is a source archive
// with a Dockerfile that builds, and busybox.

import assert from 'node:assert/strict';
import * as buffer from 'node:buffer';
import { createReadStream } from 'node:fs';
import Hypeman from '@onkernel/hypeman';

// The SDK wants it so before Node 20.
globalThis.File ??= buffer.File;

const source = () => createReadStream(process.argv[2]);

// Dockerfiles that are sent beside the archive.
const busybox = 'FROM scratch\nCOPY --chmod=755 busybox /bin/busybox\n';
const fails = `${busybox}RUN ["/bin/busybox", "sh", "-c", "echo last words; exit 7"]\n`;
const waits = `${busybox}RUN ["/bin/busybox", "sh", "-c", "echo waiting; exec /bin/busybox sleep 100000"]\n`;

const digest = /^sha256:[0-9a-f]{64}$/;
const client = new Hypeman();

const ok = (what) => console.log('OK', what);

/** Checks that a call throws the SDK's error of that kind, with Kiln's code in its body. */
async function refused(kind, code, call) {
  await assert.rejects(call, (error) => {
    assert(error instanceof kind, error);
    assert.equal(error.error.code, code);
    assert(error.error.message);
    return true;
  });
}

async function submit(kind, more) {
  const tags = { sdk: 'node', kind };
  const build = await client.builds.create({
    source: source(),
    tags: JSON.stringify(tags),
    cpus: 1,
    timeout_seconds: 300,
    ...more,
  });
  assert.equal(build.status, 'queued');
  assert.deepEqual(build.tags, tags);
  assert((build.queue_position ?? 1) >= 1);
  for (const later of ['started_at', 'image_digest', 'error']) assert.equal(build[later], undefined);
  return build;
}

/** Every event of a build to the end of the stream: its statuses, and its lines. */
async function follow(build, each = async () => {}) {
  const read = async (stream, each) => {
    const [statuses, lines] = [[], []];
    for await (const event of stream) {
      assert(Date.parse(event.timestamp) >= Date.parse(build.created_at) - 1000, event.timestamp);
      if (event.type === 'status') statuses.push(event.status);
      if (event.type === 'log') lines.push(event.content);
      await each(event);
    }
    return { statuses, lines };
  };
  const live = await read(await client.builds.events(build.id, { follow: true }), each);
  // Without follow it is what is stored, which is the same.
  assert.deepEqual(await read(await client.builds.events(build.id), async () => {}), live);
  return live;
}

function ended(build) {
  const [created, started, completed] = [build.created_at, build.started_at, build.completed_at].map(Date.parse);
  assert(created <= started && started <= completed);
  assert.equal(build.duration_ms, completed - started);
  assert.match(build.provenance.source_hash, digest);
  assert.equal(build.provenance.timestamp, build.completed_at);
  assert.equal(build.queue_position, undefined);
}

async function aBuildThatIsReady({ id, ...submitted }) {
  const { statuses, lines } = await follow({ id, ...submitted });
  assert.deepEqual(statuses, ['queued', 'building', 'pushing', 'ready']);
  assert(lines.includes('built by a step'), lines.join('\n'));
  const build = await client.builds.get(id);
  ended(build);
  assert.equal(build.status, 'ready');
  assert.equal(build.error, undefined);
  assert.match(build.image_digest, digest);
  assert(build.image_ref.endsWith(`/dev/sdk/node@${build.image_digest}`), build.image_ref);
  assert.deepEqual(build.provenance.lockfile_hashes, {});
  ok('a build is ready');
  return build;
}

async function aBuildThatFails(submitted) {
  const { statuses, lines } = await follow(submitted);
  assert.deepEqual(statuses, ['queued', 'building', 'failed']);
  assert(lines.includes('last words'), lines.join('\n'));
  const build = await client.builds.get(submitted.id);
  ended(build);
  assert.equal(build.status, 'failed');
  assert.equal(build.image_ref, undefined);
  assert.match(build.error, /step 1.*exit code 7/);
  ok(`a failed build names its step and exit code: ${build.error}`);
}

async function aBuildThatIsCancelled(submitted) {
  const { id } = submitted;
  const { statuses } = await follow(submitted, async (event) => {
    if (event.type !== 'log' || event.content !== 'waiting') return;
    assert.equal((await client.builds.get(id)).status, 'building');
    await client.builds.cancel(id);
  });
  assert.deepEqual(statuses, ['queued', 'building', 'cancelled']);
  const build = await client.builds.get(id);
  ended(build);
  assert.equal(build.status, 'cancelled');
  await refused(Hypeman.ConflictError, 'finished', () => client.builds.cancel(id));
  ok('a running build is cancelled, once');
}

async function lists(ready, failed, cancelled) {
  const ids = async (asked) => (await client.builds.list(asked)).map((build) => build.id);
  const tags = { sdk: 'node' };
  assert.deepEqual(await ids({ tags }), [cancelled.id, failed.id, ready.id]);
  assert.deepEqual(await ids({ tags: { ...tags, kind: 'fails' } }), [failed.id]);
  assert.deepEqual(await ids({ tags: { sdk: 'another' } }), []);
  // Kiln's own parameters, as the SDK sends what it does not know.
  assert.deepEqual(await ids({ tags, status: 'ready' }), [ready.id]);
  assert.deepEqual(await ids({ limit: 1 }), [cancelled.id]);
  ok('builds are listed by tags and status');
}

async function refusals() {
  const { builds, instances } = client;
  const nobody = '00000000-0000-7000-8000-000000000000';
  for (const call of [
    () => builds.get(nobody),
    () => builds.cancel(nobody),
    () => builds.events(nobody),
    () => instances.get(nobody),
    () => instances.delete(nobody),
  ]) {
    await refused(Hypeman.NotFoundError, 'not_found', call);
  }
  const archive = new File(['no archive'], 'source.tar.gz');
  await refused(Hypeman.BadRequestError, 'invalid_source', () => builds.create({ source: archive }));
  await refused(Hypeman.UnprocessableEntityError, 'invalid_field', () => builds.create({ source: source(), cpus: 0 }));
  const stranger = client.withOptions({ apiKey: 'kiln_of_nobody' });
  await refused(Hypeman.AuthenticationError, 'unauthorized', () => stranger.builds.list());
  ok("refusals are the SDK's errors");
}

async function anInstance(image) {
  const { instances } = client;
  const name = 'sdk-node';
  const made = await instances.create({ image, name, env: { GREETING: 'hello' }, vcpus: 1, size: '512MB' });
  assert.deepEqual([made.name, made.image, made.vcpus, made.size], [name, image, 1, '512MB']);
  assert(['Created', 'Initializing', 'Running'].includes(made.state), made.state);
  await refused(Hypeman.ConflictError, 'name_taken', () => instances.create({ image, name }));
  for await (const line of await instances.logs(made.id, { follow: true })) {
    if (line === 'hello') break;
  }
  const running = await instances.get(made.id);
  assert.equal(running.state, 'Running');
  assert(Date.parse(running.started_at) >= Date.parse(running.created_at));
  assert.equal(running.exit_code, undefined);
  assert((await instances.list()).some(({ id }) => id === made.id));
  await instances.delete(made.id);
  await refused(Hypeman.NotFoundError, 'not_found', () => instances.get(made.id));
  ok('an instance of the built image ran and is gone');
}

assert.deepEqual(await client.health.check(), { status: 'ok' });
ok('it is well');
await refusals();
// Two at one time, and the third once the first has gone.
const first = await submit('ready', { image_name: 'sdk/node' });
const second = await submit('fails', { dockerfile: fails });
const third = await submit('waits', { dockerfile: waits });
const ready = await aBuildThatIsReady(first);
await aBuildThatFails(second);
await aBuildThatIsCancelled(third);
await lists(first, second, third);
await anInstance(ready.image_ref);
