//! Files and directories of ours: private, atomic, and never outside the root that they belong to.
