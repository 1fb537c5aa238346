//! One pod: source, admission, worker, environment, volumes, status, publisher.
