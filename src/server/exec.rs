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
use tokio::sync::watch;

use super::body::{Answer, text};
use super::find::Refused;
use super::streams::remote_command::{self, Negotiated, RemoteCommand, Status, Streams};
use super::streams::{Closed, Settings, StreamReader};
use crate::container::{ExecStdio, terminal};
use crate::pod::session::{Exec, Gone, REST_LIMIT, RunHandle, run_to_end};

/// One read of a program's output.
const READ_BYTES: usize = 64 * 1024;

/// A pipe's buffer: what an ordinary user may ask for (/proc/sys/fs/pipe-max-size, pipe(7)); the default is 64 KiB.
const PIPE_BYTES: usize = 1 << 20;

/// What `/run` answers with at most: it is held in memory until the program has ended.
const RUN_BYTES: usize = 1 << 20;

/// How long a program whose client is gone may take to end by SIGHUP before it is killed.
const HANG_UP: Duration = Duration::from_secs(2);

/// Answers a request for exec with 101 and goes on beside it.
///
/// # Errors
/// When it asks for what cannot be.
pub fn exec(request: Request<Incoming>, run: RunHandle, who: String) -> Result<Response<Answer>, Refused> {
    let query = request.uri().query();
    let command: Vec<String> =
        super::find::query(query).filter(|(name, _)| name == "command").map(|(_, value)| value).collect();
    if command.is_empty() {
        return Err(Refused::new(StatusCode::BAD_REQUEST, "you must specify a command"));
    }
    upgrade(request, move |session, streams| async move {
        let RemoteCommand { stdin, stdout, stderr, resize, status, closed } = session;
        let client = Client { stdin, stdout: boxed(stdout), stderr: boxed(stderr), resize, closed };
        let end = if streams.tty {
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
///
/// # Errors
/// When it asks for what cannot be.
pub fn attach(request: Request<Incoming>, run: RunHandle) -> Result<Response<Answer>, Refused> {
    upgrade(request, move |session, _| async move {
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
        Ok(0) => Ok(text(StatusCode::OK, output)),
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
    resize: tokio::sync::mpsc::Receiver<remote_command::TerminalSize>,
    closed: Closed,
}

/// Judges the request, answers it, and runs `session` on the upgraded connection.
fn upgrade<F: Future<Output = ()> + Send>(
    mut request: Request<Incoming>,
    session: impl FnOnce(RemoteCommand, Streams) -> F + Send + 'static,
) -> Result<Response<Answer>, Refused> {
    let query = request.uri().query().map(str::to_owned);
    let negotiated = match remote_command::negotiate(request.method(), request.headers(), query.as_deref()) {
        Ok(negotiated) => negotiated,
        Err(refusal) => return Ok(refusal.response()),
    };
    let response = negotiated.response();
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Err(error) = converse(upgraded, negotiated, session).await {
            tracing::info!(%error, "a client's session could not begin");
        }
    });
    Ok(response)
}

async fn converse<F: Future<Output = ()> + Send>(
    upgraded: hyper::upgrade::OnUpgrade,
    negotiated: Negotiated,
    session: impl FnOnce(RemoteCommand, Streams) -> F + Send + 'static,
) -> Result<(), String> {
    let connection = upgraded.await.map_err(|error| error.to_string())?;
    let streams = negotiated.streams;
    let accepted = negotiated.accept(TokioIo::new(connection), Settings::REMOTE_COMMAND).await;
    session(accepted.map_err(|error| error.to_string())?, streams).await;
    Ok(())
}

async fn in_pipes(run: &RunHandle, command: Vec<String>, client: Client) -> Result<Status, String> {
    let failed = |error: std::io::Error| format!("pipes for the program: {error}");
    let Client { stdin, stdout, stderr, resize: _, mut closed } = client;
    let (their_input, input) = input_pipe(stdin.is_some()).map_err(failed)?;
    let (output, their_output) = output_pipe().map_err(failed)?;
    let (errors, their_errors) = output_pipe().map_err(failed)?;
    let stdio = ExecStdio::Pipes([their_input, their_output, their_errors]);
    let mut exec = run.exec(command, stdio).await.map_err(|error| error.to_string())?;
    let feeding = feed(stdin, input);
    let (over, is_over) = watch::channel(false);
    let showing =
        async { tokio::join!(show(output, stdout, is_over.clone()), show(errors, stderr, is_over)) };
    tokio::pin!(feeding, showing);
    let (mut fed, mut shown) = (false, false);
    let end = loop {
        tokio::select! {
            end = exec.ended() => break end,
            () = &mut feeding, if !fed => fed = true,
            _ = &mut showing, if !shown => shown = true,
            _ = closed.wait() => return hang_up(exec).await,
        }
    };
    over.send_replace(true);
    if !shown {
        tokio::select! {
            _ = &mut showing => {}
            _ = closed.wait() => {}
        }
    }
    ended(end)
}

async fn in_terminal(run: &RunHandle, command: Vec<String>, client: Client) -> Result<Status, String> {
    let failed = |error: std::io::Error| format!("a terminal for the program: {error}");
    let Client { stdin, stdout, stderr: _, mut resize, mut closed } = client;
    let (ours, theirs) = terminal::open().map_err(failed)?;
    // The first size comes with the request: a program that asks at once finds it.
    if let Ok(Some(size)) = tokio::time::timeout(FIRST_SIZE, resize.recv()).await {
        let _ = terminal::resize(&ours, size.width, size.height);
    }
    let sized = ours.try_clone().map_err(failed)?;
    let output =
        pipe::Receiver::from_owned_fd_unchecked(ours.try_clone().map_err(failed)?).map_err(failed)?;
    let input = pipe::Sender::from_owned_fd_unchecked(ours).map_err(failed)?;
    let mut exec = run.exec(command, ExecStdio::Terminal(theirs)).await.map_err(|error| error.to_string())?;
    let (over, is_over) = watch::channel(false);
    let showing = show(output, stdout, is_over);
    let feeding = feed(stdin, stdin_of(input));
    tokio::pin!(feeding, showing);
    let (mut fed, mut shown, mut sizes) = (false, false, true);
    let end = loop {
        tokio::select! {
            end = exec.ended() => break end,
            () = &mut feeding, if !fed => fed = true,
            () = &mut showing, if !shown => shown = true,
            size = resize.recv(), if sizes => match size {
                Some(size) => { let _ = terminal::resize(&sized, size.width, size.height); }
                None => sizes = false,
            },
            _ = closed.wait() => return hang_up(exec).await,
        }
    };
    over.send_replace(true);
    if !shown {
        tokio::select! {
            () = &mut showing => {}
            _ = closed.wait() => {}
        }
    }
    ended(end)
}

/// How long a terminal's first size is waited for: it is on its way with the request.
const FIRST_SIZE: Duration = Duration::from_millis(20);

fn stdin_of(input: pipe::Sender) -> Option<pipe::Sender> {
    Some(input)
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
    // The supervisor closes them at the container's end.
    let (_over, is_over) = watch::channel(false);
    let showing =
        async { tokio::join!(show(output, stdout, is_over.clone()), show(errors, stderr, is_over)) };
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

/// What a program writes, until its outputs are closed or it is over. Where nobody wants it, it is thrown away, so that the
/// program goes on.
///
/// When it is over, what it wrote is in the pipe, and the client may take its time for that; what it left behind may hold the
/// pipe open, and even write to it, and is not waited for.
async fn show(mut output: pipe::Receiver, mut client: Output, mut over: watch::Receiver<bool>) {
    let mut bytes = vec![0; READ_BYTES];
    let mut rest = PIPE_BYTES;
    while rest > 0 {
        let is_over = *over.borrow();
        let read = tokio::select! {
            read = output.read(&mut bytes) => read,
            Ok(_) = over.wait_for(|over| *over), if !is_over => continue,
            () = tokio::time::sleep(REST_LIMIT), if is_over => break,
        };
        // A terminal's end is an error (EIO).
        let Ok(n @ 1..) = read else { break };
        if let Some(writer) = &mut client
            && writer.write_all(&bytes[..n]).await.is_err()
        {
            client = None;
        }
        if is_over {
            rest = rest.saturating_sub(n);
        }
    }
    if let Some(writer) = &mut client {
        let _ = writer.flush().await;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tokio::time::{sleep, timeout};

    use super::*;

    #[tokio::test]
    async fn a_slow_client_gets_all_that_a_program_wrote_and_no_more_is_waited_for() {
        let (output, theirs) = output_pipe().unwrap();
        let (client, mut reader) = tokio::io::duplex(1000);
        let (over, is_over) = watch::channel(false);
        let showing = tokio::spawn(show(output, boxed(Some(client)), is_over));
        // What the program has left behind holds the pipe open.
        let mut program = std::fs::File::from(theirs);
        program.write_all(&[b'x'; 200_000]).unwrap();
        over.send_replace(true);
        let (mut got, mut bytes) = (0, vec![0; 100_000]);
        while got < 200_000 {
            // Longer than a pipe is waited for, twice.
            if [0, 100_000].contains(&got) {
                sleep(2 * REST_LIMIT).await;
            }
            let n = timeout(Duration::from_secs(10), reader.read(&mut bytes)).await.unwrap().unwrap();
            assert!(n > 0, "the end came after {got} bytes");
            got += n;
        }
        timeout(Duration::from_secs(10), showing).await.unwrap().unwrap();
        drop(program);
    }
}
