//! The question put to the batch system: when does this job end?

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::command::CommandError;
use super::environment::Environment;
use super::{TimeLimit, pbs, slurm};

/// What the batch system answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// [`TimeLimit::Ends`] or [`TimeLimit::Unlimited`].
    pub limit: TimeLimit,
    /// The command and what of its answer was used.
    pub source: String,
}

/// Why the batch system gave no answer that can be used. Whatever was known before still holds then.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The command did not answer.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The answer has nothing of this job.
    #[error("{command} knows nothing of job {job}: {reason}")]
    NotKnown {
        /// The command.
        command: &'static str,
        /// The job's id.
        job: String,
        /// What the command said, or that it said nothing.
        reason: String,
    },
    /// The batch system has no time limit to tell: NOT_SET, INVALID.
    #[error("{command} answers `{answer}` for the time limit of job {job}")]
    NoLimit {
        /// The command.
        command: &'static str,
        /// The job's id.
        job: String,
        /// Its answer.
        answer: String,
    },
    /// The answer is not what the manual says.
    #[error("{command} answers what cannot be read for job {job}: {what}")]
    Unreadable {
        /// The command.
        command: &'static str,
        /// The job's id.
        job: String,
        /// What was found.
        what: String,
    },
}

/// Whom to ask, and for which job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// squeue, for this job id.
    Slurm {
        /// SLURM_JOB_ID.
        job: String,
    },
    /// qstat, for this job id.
    Pbs {
        /// PBS_JOBID.
        job: String,
        /// Whether it is Torque, whose qstat knows no JSON.
        torque: bool,
        /// The job began at this moment at the latest: the pilot's first start.
        begun: SystemTime,
    },
    /// There is no batch system.
    Nobody,
}

impl Question {
    /// Asks, and takes at most `limit` for each command (two at most).
    ///
    /// # Errors
    /// See [`AskError`]. [`Question::Nobody`] always answers [`TimeLimit::Unlimited`].
    pub async fn ask(&self, env: &Environment, limit: Duration) -> Result<Answer, AskError> {
        match self {
            Self::Slurm { job } => slurm::ask(env, job, limit).await,
            Self::Pbs { job, torque, begun } => {
                let (job, asked) = pbs::ask(env, job, *torque, limit).await?;
                job.answer(asked, *begun)
            }
            Self::Nobody => Ok(Answer { limit: TimeLimit::Unlimited, source: "no batch system".to_owned() }),
        }
    }
}

/// The moment without its fraction of a second. A batch system counts what is left in whole seconds of its own clock
/// reading, so whole seconds before the question plus what is left is the end, or up to a moment before it; never after.
pub(super) fn whole_seconds(moment: SystemTime) -> SystemTime {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(since.as_secs())
}
