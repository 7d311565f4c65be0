"""What schemathesis cannot know of the API. Nothing here hides an answer: it only says what is sent.

A schema describes each value for itself. Where values of one request exclude each other, or name something that has to
be there, well-formed requests are changed so that the API has no reason to refuse them; those refusals have tests of
their own in tests/api. Malformed requests are sent as they are.
"""

import itertools
import json
import os

import schemathesis
from hypothesis import strategies as st

# Characters of a repository, with room for the tenant's.
MAX_REPOSITORY = 200

# The first bytes tell what an archive is. These are texts: of bytes it cannot say whether they are a schema's.
ARCHIVES = ["P*M\x18" + "a" * 30, "a" * 257 + "ustar" + "a" * 250]
schemathesis.openapi.format("archive", st.sampled_from(ARCHIVES))

# A pattern cannot say how large the number in it may be.
schemathesis.openapi.format("size", st.integers(256, 65536).map(lambda n: f"{n}MB"))


def distinct(secrets):
    """No two have the same id, and no two the same variable."""
    ids = {secret["id"]: secret for secret in secrets}
    variables = {secret.get("env_var") or number: secret for number, secret in enumerate(ids.values())}
    return list(variables.values())


# Texts that hold JSON: it makes none of a contentSchema. Each part of them gets a format of its own.
VARIABLES = st.one_of(st.none(), st.just(""), st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True))
SECRETS = st.lists(
    st.fixed_dictionaries(
        {"id": st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True)}, optional={"env_var": VARIABLES}
    ),
    max_size=5,
)
JSON = {
    "secrets": SECRETS.map(lambda secrets: json.dumps(distinct(secrets))),
    "allowed_domains": st.sampled_from(["", "[]", " [ ] "]),
}
for name, texts in JSON.items():
    schemathesis.openapi.format(f"json-{name}", texts)


@schemathesis.hook
def before_load_schema(context, raw_schema):
    schemas = raw_schema["components"]["schemas"]
    parts = schemas["NewBuild"]["properties"]
    parts["source"]["format"] = "archive"
    for name in (name for name, part in parts.items() if "contentSchema" in part):
        parts[name]["format"] = f"json-{name}"
    # A value is of a secret that is declared: one that is not is refused.
    del schemas["NewBuild"]["patternProperties"]
    # A pattern cannot say how long a part of it may be: a repository, with the tenant.
    for owner, name in (("NewBuild", "image_name"), ("NewInstance", "image")):
        image = schemas[owner]["properties"][name]
        texts = st.from_regex(image["pattern"], fullmatch=True).filter(lambda name: len(name) <= MAX_REPOSITORY)
        schemathesis.openapi.format(name, texts)
        image["format"] = name


numbers = itertools.count()


@schemathesis.hook
def before_call(context, case, kwargs):
    spare_own_token(case)
    if case.meta is None or case.meta.generation.mode.is_positive:
        query, headers = case.query or {}, case.headers or {}
        apart(query, "vm", "with_secrets", only=is_true)
        apart(query, "build", "instance")
        if case.operation.label == "GET /builds":
            # A cursor is one that a Link header gave.
            query.pop("cursor", None)
        if "idempotency-key" in headers:
            # A key belongs to one body: with another one it is refused.
            headers["idempotency-key"] = f"{headers['idempotency-key'][:200].rstrip()}-{next(numbers)}"


def spare_own_token(case):
    """The token that the calls are made with is to stay: another one that is there goes."""
    if case.operation.label == "DELETE /tokens/{id}" and case.path_parameters["id"] == os.environ["KILN_TOKEN_ID"]:
        case.path_parameters["id"] = os.environ["KILN_OTHER_TOKEN_ID"]


def apart(query, first, second, only=lambda value: True):
    """Two places at one time are none."""
    if first in query and second in query and only(query[first]) and only(query[second]):
        del query[second]


def is_true(value):
    return value is True or value == "true"

