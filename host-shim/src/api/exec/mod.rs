//! GET `/builds/{id}/exec` and `/instances/{id}/exec`: a command in a VM that is there, over a WebSocket.
//!
//! ```text
//! token ─▶ role ─▶ whose it is ─▶ is it open? ─▶ room ─▶ 101 ─▶ first text: the command ─▶ exec::Admitted::run
//! ```
//! Everything up to the 101 is refused as every request is; what comes after it is told in the last text.
//! docs/EXEC.md has the format.

mod message;
mod socket;

use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{WebSocket, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::http::header::UPGRADE;
use axum::response::Response;
use kiln_protocol::exec::{Open, Place};
use tracing::Instrument;

use self::message::{Asked, MAX_MESSAGE};
use self::socket::Socket;
use super::error::ApiError;
use super::get_build::{self, Wanted};
use super::instances::get as get_instance;
use super::openapi::problems::{Conflict, Forbidden, NotFound, Unavailable, UpgradeRequired};
use super::{Api, Shared};
use crate::build::{BuildId, Status};
use crate::exec::{Admitted, Entrance, NotAdmitted, Outcome, Subject};
use crate::instances::{InstanceId, State as Lifecycle};
use crate::store::Role;
use crate::token::Caller;

/// What is read of a connection at one time.
const READ_BUFFER: usize = 32 * 1024;

type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

/// Run a command in build's VM
///
/// A WebSocket (RFC 6455). First text message: `{"command":["sh"],"tty","env","cwd","user","timeout","rows","cols","vm","with_secrets"}`; binary messages
/// are standard input and output; then `{"resize":{"rows","cols"}}`, `{"signal":"INT"}`, `{"stdin_closed":true}`; the last text message that
/// comes is `{"exitCode":N}`.
#[utoipa::path(
    get, path = "/builds/{id}/exec", tag = "sessions", params(Wanted),
    responses(
        (status = 101, description = "The session begins."),
        Forbidden, NotFound, Conflict, UpgradeRequired, Unavailable,
    ),
)]
pub(super) async fn build_exec(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    let admitted = enter_build(&api, caller, id).await?;
    upgraded(&api, upgrade, admitted)
}

/// Run a command in instance's VM
///
/// A WebSocket (RFC 6455). First text message: `{"command":["sh"],"tty","env","cwd","user","timeout","rows","cols","vm","with_secrets"}`; binary messages
/// are standard input and output; then `{"resize":{"rows","cols"}}`, `{"signal":"INT"}`, `{"stdin_closed":true}`; the last text message that
/// comes is `{"exitCode":N}`.
#[utoipa::path(
    get, path = "/instances/{id}/exec", tag = "sessions", params(get_instance::Wanted),
    responses(
        (status = 101, description = "The session begins."),
        Forbidden, NotFound, Conflict, UpgradeRequired, Unavailable,
    ),
)]
pub(super) async fn instance_exec(
    State(api): State<Shared>,
    caller: Caller,
    get_instance::Wanted(id): get_instance::Wanted,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    let admitted = enter_instance(&api, caller, id).await?;
    upgraded(&api, upgrade, admitted)
}

/// Lets a caller into a build's VM, for one session.
pub(super) async fn enter_build(
    api: &Api,
    caller: Caller,
    id: BuildId,
) -> Result<Admitted, ApiError> {
    caller.require(Role::Tenant)?;
    let build = get_build::find(api, &caller, &id).await?;
    let entrance = match build.status {
        Status::Queued => {
            let message = format!("{id} is queued; it can be entered when it runs");
            return Err(ApiError::conflict("not_started", message));
        }
        Status::Building | Status::Pushing => api.state.scheduler.entrance(&id),
        Status::Ready | Status::Failed | Status::Cancelled => match api.state.kept.entrance(&id) {
            Some(entrance) => Some(entrance),
            None => return Err(not_kept(&id, build.status)),
        },
    };
    let entrance = entrance.ok_or_else(|| not_open(id.as_str()))?;
    admit(api, entrance, build.tenant, Subject::Build(id), caller)
}

/// Lets a caller into an instance's VM, for one session.
pub(super) async fn enter_instance(
    api: &Api,
    caller: Caller,
    id: InstanceId,
) -> Result<Admitted, ApiError> {
    caller.require(Role::Tenant)?;
    let instance = get_instance::find(api, &caller, &id).await?;
    let entrance = match instance.state {
        Lifecycle::Stopped => {
            let message = format!("{id} has stopped; only a running instance can be entered");
            return Err(ApiError::conflict("finished", message));
        }
        Lifecycle::Created => {
            let message = format!("{id} waits for a VM; it can be entered when it runs");
            return Err(ApiError::conflict("not_started", message));
        }
        Lifecycle::Initializing | Lifecycle::Running => api.state.instances.entrance(&id),
    };
    let entrance = entrance.ok_or_else(|| not_open(id.as_str()))?;
    admit(api, entrance, instance.tenant, Subject::Instance(id), caller)
}

/// It has ended, and its VM is gone.
fn not_kept(id: &BuildId, status: Status) -> ApiError {
    let message = format!(
        "{id} is {status}, and its VM is not there to be entered; to keep that of a build that fails, submit it with \
         --keep-failed SECONDS"
    );
    ApiError::conflict("finished", message)
}

/// Its VM boots, or is on its way out.
fn not_open(id: &str) -> ApiError {
    let message =
        format!("the VM of {id} is starting or ending and cannot be entered now; try again soon");
    ApiError::conflict("not_open", message).retry_after(1)
}

fn admit(
    api: &Api,
    entrance: Entrance,
    tenant: crate::build::Tenant,
    subject: Subject,
    caller: Caller,
) -> Result<Admitted, ApiError> {
    let admitted = api.state.sessions.admit(entrance, tenant, subject, caller.into());
    admitted.map_err(|refused| {
        let message = refused.to_string();
        match refused {
            NotAdmitted::Full(_) => ApiError::too_many("too_many_sessions", message, 5),
            NotAdmitted::Stopping => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                ApiError::new(status, "stopping", message).retry_after(5)
            }
        }
    })
}

/// Changes to WebSocket, last of all.
fn upgraded(api: &Shared, upgrade: Upgrade, admitted: Admitted) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|rejection| {
        let message = format!("this path speaks WebSocket (RFC 6455) only: {rejection}");
        ApiError::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", message)
            .with_header(UPGRADE, "websocket")
    })?;
    let sessions = api.state.sessions.clone();
    let span = tracing::Span::current();
    Ok(upgrade
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE)
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(0)
        .on_upgrade(move |socket| sessions.track(serve(socket, admitted)).instrument(span)))
}

/// From the first message to the last.
async fn serve(socket: WebSocket, admitted: Admitted) {
    let mut socket = Socket::new(socket);
    let outcome = match socket.opening().await {
        Ok(asked) => run(&mut socket, &admitted, asked).await,
        Err(gone) => Outcome::from(gone),
    };
    // Its place is free for others before the client knows.
    drop(admitted);
    socket.finish(&outcome).await;
}

async fn run(socket: &mut Socket, admitted: &Admitted, asked: Asked) -> Outcome {
    let Asked { exec, timeout, multiplex } = asked;
    if let Err(why) = permitted(exec.place, admitted.who().role) {
        return admitted.refuse(&Open::Exec(exec), why).await;
    }
    let (input, output) = socket.halves(multiplex);
    admitted.run(exec, timeout, input, output).await
}

/// What a role may do inside.
pub(super) fn permitted(place: Place, role: Role) -> Result<(), String> {
    let (what, least) = match place {
        Place::Vm => ("to enter the VM itself", Role::Admin),
        Place::Job { .. } => ("to enter", Role::Tenant),
    };
    if role >= least {
        return Ok(());
    }
    Err(format!("this token's role is {role}; {what} needs the role {least}"))
}

/// How long a client may take to say what it wants.
const OPENING_DEADLINE: Duration = Duration::from_secs(30);
/// How long the last message may take to leave, and the client to hang up.
pub(super) const LAST_DEADLINE: Duration = Duration::from_secs(10);
