//! `/exec`, `/attach` and `/run`: programs in containers, and containers' own input and output. Sources: cri-streaming
//! `remotecommand`, kubelet's `server.go`.

use std::os::fd::OwnedFd;
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use super::body::{Answer, typed};
use super::find::Refused;
use super::streams::remote_command::{self, Negotiated, RemoteCommand, Status};
use super::streams::{Closed, Settings, StreamReader};
use crate::container::{ExecStdio, terminal};
use crate::pod::session::{Exec, Gone, REST_LIMIT, RunHandle, run_to_end};

/// One read of a program's output.
const READ_BYTES: usize = 64 * 1024;

/// A pipe's buffer; the default is 64 KiB. The pipes of one user together have 64 MiB (pipe-user-pages-soft, pipe(7)); with
/// that used up, every new one, a pod's `a | b` too, has two pages. All sessions' two pipes are 40 MiB of it.
const PIPE_BYTES: usize = 256 << 10;

/// What `/run` answers with at most: it is held in memory until the program has ended.
const RUN_BYTES: usize = 1 << 20;

/// How long a program whose client is gone may take to end by SIGHUP before it is killed.
const HANG_UP: Duration = Duration::from_secs(2);

/// The command that a query names.
///
/// # Errors
/// When it names none.
pub fn command(query: Option<&str>) -> Result<Vec<String>, Refused> {
    let command: Vec<String> =
        super::find::query(query).filter(|(name, _)| name == "command").map(|(_, value)| value).collect();
    if command.is_empty() {
        return Err(Refused::new(StatusCode::BAD_REQUEST, "you must specify a command"));
    }
    Ok(command)
}

/// Answers a request for exec with 101 and goes on beside it.
pub fn exec(
    request: Request<Incoming>,
    negotiated: Negotiated,
    run: RunHandle,
    command: Vec<String>,
    who: String,
    room: OwnedSemaphorePermit,
) -> Response<Answer> {
    let tty = negotiated.streams.tty;
    upgrade(request, negotiated, room, move |session| async move {
        let RemoteCommand { stdin, stdout, stderr, resize, status, closed } = session;
        let client = Client { stdin, stdout: boxed(stdout), stderr: boxed(stderr), resize, closed };
        let end = if tty {
            in_terminal(&run, command, client).await
        } else {
            in_pipes(&run, command, client).await
        };
        let end = end.unwrap_or_else(Status::Failure);
        tracing::info!(user = who, ?end, "a program in a container has ended");
        let _ = status.send(end).await;
    })
}

/// Answers a request for attach with 101 and goes on beside it.
pub fn attach(
    request: Request<Incoming>,
    negotiated: Negotiated,
    run: RunHandle,
    room: OwnedSemaphorePermit,
) -> Response<Answer> {
    upgrade(request, negotiated, room, move |session| async move {
        let RemoteCommand { stdin, stdout, stderr, mut resize, status, closed } = session;
        let sizes = run.clone();
        let sizes = tokio::spawn(async move {
            while let Some(size) = resize.recv().await {
                sizes.resize(size.width, size.height).await;
            }
        });
        let end = attached(&run, stdin, boxed(stdout), boxed(stderr), closed).await;
        sizes.abort();
        let _ = status.send(end.map_or_else(Status::Failure, |()| Status::Success)).await;
    })
}

/// `/run/…?cmd=…`: the program's output when it has ended. The words of `cmd` are split at blanks, as a kubelet does.
///
/// # Errors
/// When there is no program, or it cannot be run.
pub async fn run(query: Option<&str>, container: &RunHandle) -> Result<Response<Answer>, Refused> {
    let command = super::find::query(query).find(|(name, _)| name == "cmd").map(|(_, value)| value);
    let argv: Vec<String> = command.unwrap_or_default().split(' ').map(str::to_owned).collect();
    if argv.iter().all(String::is_empty) {
        return Err(Refused::new(StatusCode::BAD_REQUEST, "you must specify a command with cmd="));
    }
    let failed = |why: String| Refused::new(StatusCode::INTERNAL_SERVER_ERROR, why);
    let (end, output) =
        run_to_end(container, argv, RUN_BYTES).await.map_err(|error| failed(error.to_string()))?;
    let output = String::from_utf8_lossy(&output).into_owned();
    match end {
        // A kubelet's writeJSONResponse says so of any text.
        Ok(0) => Ok(typed(StatusCode::OK, "application/json", output)),
        Ok(code) => Err(failed(format!("command exited with {code}: {output}"))),
        Err(error) => Err(failed(error.to_string())),
    }
}

type Output = Option<Box<dyn AsyncWrite + Send + Unpin>>;

fn boxed(writer: Option<impl AsyncWrite + Send + Unpin + 'static>) -> Output {
    writer.map(|writer| Box::new(writer) as Box<dyn AsyncWrite + Send + Unpin>)
}

/// A client of exec.
struct Client {
    stdin: Option<StreamReader>,
    stdout: Output,
    stderr: Output,
    resize: mpsc::Receiver<remote_command::TerminalSize>,
    closed: Closed,
}

/// Answers the request, and runs `session` on the upgraded connection.
fn upgrade<F: Future<Output = ()> + Send>(
    mut request: Request<Incoming>,
    negotiated: Negotiated,
    room: OwnedSemaphorePermit,
    session: impl FnOnce(RemoteCommand) -> F + Send + 'static,
) -> Response<Answer> {
    let response = negotiated.response();
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let _room = room;
        if let Err(error) = converse(upgraded, negotiated, session).await {
            tracing::info!(%error, "a client's session could not begin");
        }
    });
    response
}

async fn converse<F: Future<Output = ()> + Send>(
    upgraded: hyper::upgrade::OnUpgrade,
    negotiated: Negotiated,
    session: impl FnOnce(RemoteCommand) -> F + Send + 'static,
) -> Result<(), String> {
    let connection = upgraded.await.map_err(|error| error.to_string())?;
    let accepted = negotiated.accept(TokioIo::new(connection), Settings::REMOTE_COMMAND).await;
    session(accepted.map_err(|error| error.to_string())?).await;
    Ok(())
}

async fn in_pipes(run: &RunHandle, command: Vec<String>, client: Client) -> Result<Status, String> {
    let failed = |error: std::io::Error| format!("pipes for the program: {error}");
    let Client { stdin, stdout, stderr, resize, closed } = client;
    let (their_input, input) = input_pipe(stdin.is_some()).map_err(failed)?;
    let (output, their_output) = output_pipe().map_err(failed)?;
    let (errors, their_errors) = output_pipe().map_err(failed)?;
    let stdio = ExecStdio::Pipes([their_input, their_output, their_errors]);
    let exec = run.exec(command, stdio).await.map_err(|error| error.to_string())?;
    let (over, ended) = watch::channel(false);
    let showing = async {
        let _ = tokio::join!(show(output, stdout, ended.clone()), show(errors, stderr, ended));
    };
    converse_until_end(exec, feed(stdin, input), showing, over, resize, None, closed).await
}

async fn in_terminal(run: &RunHandle, command: Vec<String>, client: Client) -> Result<Status, String> {
    let failed = |error: std::io::Error| format!("a terminal for the program: {error}");
    let Client { stdin, stdout, stderr: _, mut resize, closed } = client;
    let (ours, theirs) = terminal::open().map_err(failed)?;
    // The first size comes with the request: a program that asks at once finds it.
    if let Ok(Some(size)) = tokio::time::timeout(FIRST_SIZE, resize.recv()).await {
        let _ = terminal::resize(&ours, size.width, size.height);
    }
    let sized = ours.try_clone().map_err(failed)?;
    let output =
        pipe::Receiver::from_owned_fd_unchecked(ours.try_clone().map_err(failed)?).map_err(failed)?;
    let input = pipe::Sender::from_owned_fd_unchecked(ours).map_err(failed)?;
    let exec = run.exec(command, ExecStdio::Terminal(theirs)).await.map_err(|error| error.to_string())?;
    let (over, ended) = watch::channel(false);
    let showing = show(output, stdout, ended);
    converse_until_end(exec, feed(stdin, Some(input)), showing, over, resize, Some(sized), closed).await
}

/// How long a terminal's first size is waited for: it is on its way with the request.
const FIRST_SIZE: Duration = Duration::from_millis(20);

/// Carries input and output until the program has ended and the client has taken what it wrote.
async fn converse_until_end(
    mut exec: Exec,
    feeding: impl Future<Output = ()>,
    showing: impl Future<Output = ()>,
    over: watch::Sender<bool>,
    mut resize: mpsc::Receiver<remote_command::TerminalSize>,
    terminal: Option<OwnedFd>,
    mut closed: Closed,
) -> Result<Status, String> {
    tokio::pin!(feeding, showing);
    let (mut fed, mut shown, mut sizes) = (false, false, terminal.is_some());
    let end = loop {
        tokio::select! {
            end = exec.ended() => break end,
            () = &mut feeding, if !fed => fed = true,
            () = &mut showing, if !shown => shown = true,
            size = resize.recv(), if sizes => match (size, &terminal) {
                (Some(size), Some(terminal)) => {
                    let _ = terminal::resize(terminal, size.width, size.height);
                }
                _ => sizes = false,
            },
            _ = closed.wait() => return hang_up(exec).await,
        }
    };
    // What it wrote is in the pipes, and a slow client may take its time for it.
    over.send_replace(true);
    if !shown {
        tokio::select! {
            () = &mut showing => {}
            _ = closed.wait() => {}
        }
    }
    ended(end)
}

fn ended(end: Result<crate::pod::session::ExecEnd, Gone>) -> Result<Status, String> {
    match end {
        Ok(Ok(0)) => Ok(Status::Success),
        Ok(Ok(code)) => Ok(Status::Exit(u8::try_from(code).unwrap_or(u8::MAX))),
        Ok(Err(error)) => Err(error.to_string()),
        Err(Gone) => Err("the container ended, and the program with it".to_owned()),
    }
}

/// The client is gone: its program is told as by a terminal that hangs up, and killed when it stays.
async fn hang_up(mut exec: Exec) -> Result<Status, String> {
    exec.signal(Signal::SIGHUP).await;
    if tokio::time::timeout(HANG_UP, exec.ended()).await.is_err() {
        exec.signal(Signal::SIGKILL).await;
        let _ = tokio::time::timeout(HANG_UP, exec.ended()).await;
    }
    Err("the client is gone".to_owned())
}

async fn attached(
    run: &RunHandle,
    stdin: Option<StreamReader>,
    stdout: Output,
    stderr: Output,
    mut closed: Closed,
) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("pipes to the container: {error}");
    let takes_input = stdin.is_some();
    let (their_input, input) = input_pipe(takes_input).map_err(failed)?;
    let (output, their_output) = output_pipe().map_err(failed)?;
    let (errors, their_errors) = output_pipe().map_err(failed)?;
    run.attach(takes_input, [their_input, their_output, their_errors])
        .await
        .map_err(|error| error.to_string())?;
    // It ends with the container, whose supervisor closes both.
    let (_open, never) = watch::channel(false);
    let showing = async { tokio::join!(show(output, stdout, never.clone()), show(errors, stderr, never)) };
    let feeding = feed(stdin, input);
    tokio::pin!(showing, feeding);
    let mut fed = false;
    loop {
        tokio::select! {
            _ = &mut showing => return Ok(()),
            () = &mut feeding, if !fed => fed = true,
            _ = closed.wait() => return Err("the client is gone".to_owned()),
        }
    }
}

/// A program's end of its standard input, and ours where there is any.
fn input_pipe(wanted: bool) -> std::io::Result<(OwnedFd, Option<pipe::Sender>)> {
    if !wanted {
        return Ok((std::fs::File::open("/dev/null")?.into(), None));
    }
    let (theirs, ours) = std::io::pipe()?;
    Ok((theirs.into(), Some(pipe::Sender::from_owned_fd(ours.into())?)))
}

/// Our end of a program's output, and the program's.
fn output_pipe() -> std::io::Result<(pipe::Receiver, OwnedFd)> {
    let (ours, theirs) = std::io::pipe()?;
    // The default does too, only slower.
    let _ = rustix::pipe::fcntl_setpipe_size(&theirs, PIPE_BYTES);
    Ok((pipe::Receiver::from_owned_fd(ours.into())?, theirs.into()))
}

/// What the client types, until it ends it or the program takes no more.
async fn feed(stdin: Option<StreamReader>, input: Option<pipe::Sender>) {
    if let (Some(mut stdin), Some(mut input)) = (stdin, input) {
        let _ = tokio::io::copy(&mut stdin, &mut input).await;
    }
}

/// What a program writes, until its end: that of the pipe, or, once the program is `over`, a silence; what it left behind
/// may hold the pipe open. Where nobody wants it, it is thrown away, so that the program goes on.
async fn show(mut output: pipe::Receiver, mut client: Output, mut over: watch::Receiver<bool>) {
    let mut bytes = vec![0; READ_BYTES];
    loop {
        let silence = async {
            // A sender that is gone belongs to a session that is over too.
            let _ = over.wait_for(|over| *over).await;
            tokio::time::sleep(REST_LIMIT).await;
        };
        let read = tokio::select! {
            biased;
            read = output.read(&mut bytes) => read,
            () = silence => break,
        };
        // A terminal's end is an error (EIO).
        let Ok(n) = read else { break };
        if n == 0 {
            break;
        }
        if let Some(writer) = &mut client
            && writer.write_all(&bytes[..n]).await.is_err()
        {
            client = None;
        }
    }
    if let Some(writer) = &mut client {
        let _ = writer.flush().await;
    }
}
