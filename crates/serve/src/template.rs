//! From messages to a prompt: RWKV's own template, or a Jinja file as Hugging Face has them. Tools, their calls and outputs are text of
//! messages already, as `tools.rs` says.

use anser_infer::chat::{self, Think};
use minijinja::{Environment, context};

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// What was said.
    pub content: String,
}

/// How prompts are made of messages.
pub enum Template {
    /// That of RWKV-7 "G1".
    Rwkv,
    /// A Jinja template, which is given `messages`, `add_generation_prompt` and `enable_thinking`.
    Jinja(Box<Environment<'static>>),
}

impl Template {
    /// A template from Jinja source.
    ///
    /// # Errors
    /// Where the source is no template.
    pub fn jinja(source: String) -> Result<Template, String> {
        let mut env = Environment::new();
        // As Hugging Face reads them.
        let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| e.to_string())?);
        env.add_function("raise_exception", |why: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, why))
        });
        env.add_template_owned("chat", source).map_err(|e| e.to_string())?;
        Ok(Template::Jinja(Box::new(env)))
    }

    /// The prompt up to where the model goes on.
    ///
    /// # Errors
    /// Where a Jinja template doesn't take the messages.
    pub fn prompt(&self, messages: &[Message], think: Think) -> Result<String, String> {
        match self {
            Template::Rwkv => Ok(rwkv(messages, think)),
            Template::Jinja(env) => {
                let list: Vec<_> =
                    messages.iter().map(|m| context! { role => m.role, content => &m.content }).collect();
                let thinks = !matches!(think, Think::Off | Think::Fast);
                let template = env.get_template("chat").map_err(|e| e.to_string())?;
                let given = context! { messages => list, add_generation_prompt => true, enable_thinking => thinks };
                template.render(given).map_err(|e| format!("the chat template: {e:#}"))
            }
        }
    }

    /// Texts before which an answer ends.
    pub fn stops(&self) -> &'static [&'static str] {
        match self {
            Template::Rwkv => &chat::STOPS,
            Template::Jinja(_) => &[],
        }
    }

    /// What stands between an answer and the next turn.
    pub fn turn_end(&self) -> &'static str {
        match self {
            Template::Rwkv => chat::TURN_END,
            Template::Jinja(_) => "",
        }
    }
}

/// An answer begun by the last message, if it is the assistant's, is gone on with.
fn rwkv(messages: &[Message], think: Think) -> String {
    let mut prompt = String::new();
    for (i, message) in messages.iter().enumerate() {
        let last = i + 1 == messages.len();
        prompt += &match message.role {
            "system" => chat::system(&message.content),
            "user" if last => chat::user(&message.content, think),
            "user" => format!("User: {}{}", chat::clean(&message.content), chat::TURN_END),
            _ if last => format!("Assistant: {}", chat::clean(&message.content)),
            _ => format!("Assistant: {}{}", chat::clean(&message.content), chat::TURN_END),
        };
        if last && message.role == "system" {
            prompt += "Assistant:";
        }
    }
    prompt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &'static str, content: &str) -> Message {
        Message { role, content: content.into() }
    }

    #[test]
    fn prompts() {
        let mut talk =
            vec![message("system", "Be brief."), message("user", "Hi\n\n\nyou"), message("assistant", "Hello!")];
        let rwkv = |talk: &[Message], think| Template::Rwkv.prompt(talk, think).unwrap();
        assert_eq!(rwkv(&talk, Think::Off), "System: Be brief.\n\nUser: Hi\nyou\n\nAssistant: Hello!");
        talk.push(message("user", "Why?"));
        let want = "System: Be brief.\n\nUser: Hi\nyou\n\nAssistant: Hello!\n\nUser: Why?\n\nAssistant: <think";
        assert_eq!(rwkv(&talk, Think::On), want);
        let source =
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if enable_thinking %}?{% endif %}";
        let jinja = Template::jinja(source.into()).unwrap();
        assert_eq!(jinja.prompt(&talk[..1], Think::On).unwrap(), "<system>Be brief.?");
        assert!(Template::jinja("{% for %}".into()).is_err());
        let refuses = Template::jinja("{{ raise_exception('no') }}".into()).unwrap();
        assert!(refuses.prompt(&talk, Think::Off).unwrap_err().contains("no"));
    }
}
