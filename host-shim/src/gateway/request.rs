//! One request to the backing registry: it gets the credential, and no wait is without a deadline.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt, TryStreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use tokio::time::Instant;

use super::backing::{Backing, BackingError, PATIENCE, Target};

/// A request that is being put together.
pub struct Request<'a> {
    backing: &'a Backing,
    method: Method,
    target: Target,
    headers: HeaderMap,
    body: Option<BoxStream<'static, Result<Bytes, BoxError>>>,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl<'a> Request<'a> {
    pub(super) fn new(backing: &'a Backing, method: Method, target: Target) -> Self {
        Self { backing, method, target, headers: HeaderMap::new(), body: None }
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.append(name, value);
        self
    }

    /// Adds those of the headers that are named.
    #[must_use]
    pub fn headers_of(mut self, headers: &HeaderMap, names: &[HeaderName]) -> Self {
        for name in names {
            for value in headers.get_all(name) {
                self.headers.append(name.clone(), value.clone());
            }
        }
        self
    }

    /// A small body.
    #[must_use]
    pub fn bytes(self, bytes: Bytes) -> Self {
        let length = bytes.len() as u64;
        self.stream(futures_util::stream::iter([Ok::<_, BoxError>(bytes)]), Some(length))
    }

    /// A body that streams; its length where it is known.
    #[must_use]
    pub fn stream<S, E>(mut self, stream: S, length: Option<u64>) -> Self
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<BoxError> + 'static,
    {
        if let Some(length) = length {
            self.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        self.body = Some(stream.map_err(Into::into).boxed());
        self
    }

    /// Sends it. Any status is an answer. A request without a body is sent once more when the
    /// registry refuses a token that it had given before.
    pub async fn send(mut self) -> Result<reqwest::Response, BackingError> {
        let inner = &self.backing.0;
        self.target = inner.mapping.outward(&self.target).ok_or(BackingError::LongName)?;
        let scopes = self.target.scopes(&self.method);
        let replayable = self.body.is_none();
        let response = self.send_once(&scopes).await?;
        let Some(credential) = &inner.credential else { return Ok(response) };
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        credential.forget(&scopes);
        if replayable { self.send_once(&scopes).await } else { Ok(response) }
    }

    async fn send_once(&mut self, scopes: &[String]) -> Result<reqwest::Response, BackingError> {
        let inner = &self.backing.0;
        let path = self.target.route.to_path();
        let url = inner.base.join(&self.target.to_path_and_query());
        let url = url.map_err(|_| BackingError::Location)?;
        let mut request = inner.client.request(self.method.clone(), url);
        request = request.headers(self.headers.clone());
        if let Some(credential) = &inner.credential
            && let Some(value) = credential.header(&inner.client, &inner.base, scopes).await?
        {
            request = request.header(header::AUTHORIZATION, value);
        }
        let progress = Progress::default();
        if let Some(body) = self.body.take() {
            request = request.body(reqwest::Body::wrap_stream(progress.watch(body)));
        }
        match progress.deadline(request.send()).await {
            Some(Ok(response)) => Ok(response),
            Some(Err(source)) => {
                let (method, source) = (self.method.clone(), source.without_url());
                Err(BackingError::Send { method, path, source })
            }
            None => Err(BackingError::Deadline { method: self.method.clone(), path }),
        }
    }
}

/// When something last moved in a request's body.
#[derive(Clone)]
struct Progress(Arc<Mutex<Instant>>);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }
}

impl Progress {
    fn watch(
        &self,
        body: BoxStream<'static, Result<Bytes, BoxError>>,
    ) -> impl Stream<Item = Result<Bytes, BoxError>> + Send + 'static {
        let progress = self.clone();
        body.inspect(move |_| *progress.lock() = Instant::now())
    }

    /// `None` when nothing moved for [`PATIENCE`].
    async fn deadline<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            let until = *self.lock() + PATIENCE;
            tokio::select! {
                done = &mut work => return Some(done),
                () = tokio::time::sleep_until(until) => {
                    if *self.lock() + PATIENCE <= Instant::now() {
                        return None;
                    }
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stands_still_is_given_up_and_one_that_moves_is_not() {
        let progress = Progress::default();
        assert!(progress.deadline(std::future::pending::<()>()).await.is_none());

        let progress = Progress::default();
        let moving = async {
            for _ in 0..9 {
                tokio::time::sleep(PATIENCE / 2).await;
                *progress.lock() = Instant::now();
            }
        };
        assert!(progress.deadline(moving).await.is_some());
    }
}
