//! Errors in the shape that OpenAI's clients read.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Why a request gets no answer.
#[derive(Clone, PartialEq, Debug)]
pub struct Refusal {
    pub status: StatusCode,
    pub message: String,
    /// The field of the request that is wrong.
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

impl Refusal {
    pub fn new(status: StatusCode, message: impl ToString) -> Self {
        Self { status, message: message.to_string(), param: None, code: None }
    }

    /// A field is wrong.
    pub fn field(name: &str, message: impl std::fmt::Display) -> Self {
        let message = format!("{name}: {message}");
        Self { param: Some(name.to_string()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// Too many wait already.
    pub fn busy() -> Self {
        let message = "as many completions wait as the queue holds; ask again in a moment";
        Self::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("queue_full")
    }

    pub fn stopping() -> Self {
        let message = "the server is stopping: it finishes what runs and takes nothing new";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("stopping")
    }

    pub fn failed(message: impl ToString) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    pub fn json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if matches!(self.status.as_u16(), 429 | 503) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
