//! The fields of a request's body, each checked as it is read: what is wrong is said with the field's name.

use crate::errors::ApiError;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// A JSON object. A field that is null counts as absent.
pub struct Fields(pub Map<String, Value>);

type Checked<T> = Result<T, ApiError>;

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// When it is no JSON object.
    pub fn parse(body: &[u8]) -> Checked<Fields> {
        let bad = |why: String| ApiError::new(StatusCode::BAD_REQUEST, format!("the body is not a JSON object: {why}"));
        match serde_json::from_slice(body).map_err(|e| bad(e.to_string()))? {
            Value::Object(map) => Ok(Fields(map)),
            other => Err(bad(format!("it is {}", kind(&other)))),
        }
    }

    /// A field that is there.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn read<'a, T>(&'a self, name: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Checked<Option<T>> {
        let wrong = |v| ApiError::field(name, format!("it must be {wanted}, and is {}", kind(v)));
        self.get(name).map(|v| read(v).ok_or_else(|| wrong(v))).transpose()
    }

    /// A number within a range.
    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Checked<Option<f32>> {
        let wanted = format!("a number from {} to {}", range.start(), range.end());
        let number = self.read(name, &wanted, Value::as_f64)?;
        match number.filter(|x| !range.contains(x)) {
            Some(x) => Err(ApiError::field(name, format!("it must be {wanted}, and is {x}"))),
            None => Ok(number.map(|x| x as f32)),
        }
    }

    /// A whole number within a range.
    pub fn whole(&self, name: &str, range: RangeInclusive<usize>) -> Checked<Option<usize>> {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        let number = self.read(name, &wanted, whole)?;
        let fits = |n: i64| usize::try_from(n).ok().filter(|n| range.contains(n));
        number
            .map(|n| fits(n).ok_or_else(|| ApiError::field(name, format!("it must be {wanted}, and is {n}"))))
            .transpose()
    }

    /// True or false; false if absent.
    pub fn flag(&self, name: &str) -> Checked<bool> {
        Ok(self.read(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A text.
    pub fn text(&self, name: &str) -> Checked<Option<&str>> {
        self.read(name, "a string", Value::as_str)
    }

    /// A list.
    pub fn list(&self, name: &str) -> Checked<Option<&Vec<Value>>> {
        self.read(name, "a list", Value::as_array)
    }

    /// An object.
    pub fn object(&self, name: &str) -> Checked<Option<&Map<String, Value>>> {
        self.read(name, "an object", Value::as_object)
    }

    /// Refuses fields that would change the answer if they were known here.
    pub fn refuse(&self, names: &[&str]) -> Checked<()> {
        let harmless = |v: &Value| *v == Value::Bool(false) || v.as_array().is_some_and(Vec::is_empty);
        match names.iter().find(|n| self.get(n).is_some_and(|v| !harmless(v))) {
            Some(name) => Err(ApiError::field(name, "this server doesn't have it; leave it out")),
            None => Ok(()),
        }
    }
}

/// A whole number, which JSON may write as 8.0.
pub fn whole(value: &Value) -> Option<i64> {
    let exact = |x: &f64| x.fract() == 0.0 && x.abs() < (1u64 << 53) as f64;
    value.as_i64().or_else(|| value.as_f64().filter(exact).map(|x| x as i64))
}

/// What a value is, for a message.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(n) if n.is_f64() => "a fraction",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl<S: Send + Sync> FromRequest<S> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Checked<Fields> {
        let body = Bytes::from_request(request, state).await.map_err(|e| match e.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than this server takes (--max-body)")
            }
            status => ApiError::new(status, e.body_text()),
        })?;
        Fields::parse(&body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn error<T>(result: Checked<T>) -> String {
        result.err().map(|e| e.message).unwrap_or_default()
    }

    #[test]
    fn what_is_wrong_is_said_with_the_name() {
        let f = Fields::parse(br#"{"t": 3, "n": -1, "big": 1e400, "half": 0.5, "s": 5, "none": null, "off": false}"#);
        // serde_json takes no number beyond f64.
        assert!(error(f).contains("not a JSON object"));
        let f = Fields::parse(br#"{"t": 3, "n": -1, "half": 0.5, "s": 5, "none": null, "off": false}"#).unwrap();
        assert_eq!(error(f.number("t", 0.0..=2.0)), "t: it must be a number from 0 to 2, and is 3");
        assert_eq!(error(f.whole("n", 1..=128)), "n: it must be a whole number from 1 to 128, and is -1");
        assert_eq!(error(f.whole("half", 1..=2)), "half: it must be a whole number from 1 to 2, and is a fraction");
        assert_eq!((whole(&json!(8.0)), whole(&json!(-1e3)), whole(&json!(0.5))), (Some(8), Some(-1000), None));
        assert_eq!(error(f.text("s")), "s: it must be a string, and is a number");
        assert_eq!(f.number("none", 0.0..=1.0).unwrap(), None);
        assert!(f.refuse(&["none", "off", "absent"]).is_ok());
        assert!(error(f.refuse(&["s"])).starts_with("s: "));
        assert_eq!(error(Fields::parse(b"[1]")), "the body is not a JSON object: it is a list");
    }
}
