//! WKV-7, the generalised delta rule.
