//! The tokenizer of a Hugging Face model folder.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};
use tokenizers::models::ModelWrapper;
use tokenizers::{AddedToken, Tokenizer as Encoder};

use super::chat::ChatTemplate;
use crate::error::{At, Error, Result};

/// A tokenizer that gives the ids that transformers' fast tokenizer of the same folder gives. `tokenizer.json` has
/// the last word, its post-processor on which special tokens a text gets. (transformers 5 rebuilds the tokenizers of
/// some classes instead; its `LlamaTokenizer` drops characters that a vocabulary without byte tokens cannot spell,
/// where tokenizer.json gives `<unk>`, and starts no word after a special token inside a text.)
pub struct Tokenizer {
    encoder: Encoder,
    path: PathBuf,
    bos: Option<u32>,
    eos: Option<(u32, String)>,
    pad: Option<u32>,
    stops: Vec<u32>,
    /// `bos_token`, `eos_token`, .. with their texts, for the chat template.
    special_tokens: Map<String, Value>,
    /// Read when it is first asked for.
    template: OnceLock<Arc<ChatTemplate>>,
}

/// A token as a reader may see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// What the token adds to the text; empty where it ends within a character, which the next one completes.
    pub text: String,
    pub special: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and the special tokens from the first of these files that names them:
    /// `tokenizer_config.json`, `special_tokens_map.json`, then (ids) `config.json`, `generation_config.json`.
    ///
    /// # Errors
    /// A file that is there but cannot be read or parsed, no `tokenizer.json`, a BPE model with dropout, an EOS token
    /// that is not in the vocabulary.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path)
            .map_err(|e| format!("cannot be read: {e}; a model folder needs the tokenizer.json of a fast tokenizer"))
            .at(&path)?;
        let mut encoder = Encoder::from_bytes(bytes).map_err(|e| format!("is no tokenizer: {e}")).at(&path)?;
        if let ModelWrapper::BPE(bpe) = encoder.get_model()
            && bpe.dropout.is_some_and(|rate| rate > 0.0)
        {
            return Err(Error::file(&path, "has BPE dropout: tokens would differ from run to run; set it to null"));
        }
        // Stored limits belong to whoever saved the tokenizer; here nothing is ever cut or padded silently.
        encoder.with_truncation(None).at(&path)?.with_padding(None);

        let configs = Configs::read(dir)?;
        add_special_tokens(&mut encoder, &configs).at(&path)?;
        let eos = configs.special(&encoder, "eos")?;
        let bos = configs.special(&encoder, "bos").ok().flatten().map(|(id, _)| id);
        let pad = configs.text("pad").and_then(|(_, text)| encoder.token_to_id(text));
        let stops = configs.stops(eos.as_ref().map(|(id, _)| *id));
        let special_tokens = configs.special_tokens(&encoder);
        Ok(Self { encoder, path, bos, eos, pad, stops, special_tokens, template: OnceLock::new() })
    }

    /// The ids of `text` with the special tokens around it that transformers' `tokenizer(text)` adds.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, true)
    }

    /// The ids of `text` alone: `tokenizer(text, add_special_tokens=False)`.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    /// Which tokens of [`encode_plain`](Self::encode_plain) have some of these bytes of the text.
    pub fn covered(&self, text: &str, spans: &[Range<usize>]) -> Result<Vec<bool>> {
        let encoding = self.encoder.encode(text, false);
        let encoding = encoding.map_err(|e| format!("cannot encode a text: {e}")).at(&self.path)?;
        let overlaps = |(start, end): &(usize, usize)| spans.iter().any(|span| *start < span.end && span.start < *end);
        Ok(encoding.get_offsets().iter().map(overlaps).collect())
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.encoder.encode_fast(text, add_special_tokens);
        Ok(encoding.map_err(|e| format!("cannot encode a text: {e}")).at(&self.path)?.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens skipped.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.encoder.decode(ids, true).map_err(|e| format!("cannot decode {} tokens: {e}", ids.len())).at(&self.path)
    }

    /// The text of `ids`, special tokens included.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String> {
        self.encoder.decode(ids, false).map_err(|e| format!("cannot decode {} tokens: {e}", ids.len())).at(&self.path)
    }

    /// What each token of a sequence adds to its text. Where the decoder cannot say, the vocabulary's entry.
    pub fn pieces(&self, ids: &[u32]) -> Vec<Piece> {
        let added = self.encoder.get_added_tokens_decoder();
        let mut stream = self.encoder.decode_stream(false);
        let mut piece = |id: &u32| {
            let special = added.get(id).is_some_and(|token| token.special);
            let text = match stream.step(*id) {
                Ok(text) => text.unwrap_or_default(),
                Err(_) => self.token(*id).unwrap_or_default(),
            };
            Piece { text, special }
        };
        ids.iter().map(&mut piece).collect()
    }

    /// The model's own template for conversations.
    ///
    /// # Errors
    /// The folder has none, or one that cannot be used.
    pub fn chat_template(&self) -> Result<Arc<ChatTemplate>> {
        if let Some(template) = self.template.get() {
            return Ok(template.clone());
        }
        let dir = self.path.parent().unwrap_or(Path::new("."));
        let template = ChatTemplate::load(dir, self.special_tokens.clone())?.ok_or_else(|| {
            let detail = "has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), so it \
                          cannot read messages; take the template of the model's instruct version, or write the \
                          conversation as text";
            Error::file(dir, detail)
        })?;
        Ok(self.template.get_or_init(|| Arc::new(template)).clone())
    }

    /// How many of the tokens of a conversation come before the one that ends its last turn, whatever blanks the template writes
    /// next; all, where it ends without.
    pub fn without_end(&self, ids: &[u32]) -> usize {
        let end = ids.iter().rposition(|id| self.stops.contains(id));
        let blank = |end: &usize| self.decode_all(&ids[end + 1..]).is_ok_and(|rest| rest.trim().is_empty());
        end.filter(blank).unwrap_or(ids.len())
    }

    /// The begin-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-text token, id and text.
    pub fn eos(&self) -> Option<(u32, &str)> {
        self.eos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    /// What TRL's RewardTrainer pads with: `pad_token`, else the end-of-text token. Nothing is padded here, but a reward
    /// model is read behind the last token that is another ([`Read::Last`](super::Read::Last)).
    pub fn pad(&self) -> Option<u32> {
        self.pad.or(self.eos().map(|(id, _)| id))
    }

    /// Tokens that end a generated text: the end-of-text token and those that `generation_config.json` names.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// Whether every id means the same to the tokenizer in `dir`. A folder without one is taken to share ours.
    pub fn shares_vocabulary(&self, dir: &Path) -> Result<bool> {
        let absent = !dir.join("tokenizer.json").exists();
        Ok(absent || Self::load(dir)?.encoder.get_vocab(true) == self.encoder.get_vocab(true))
    }

    /// The vocabulary entry of `id` as it is stored, for messages.
    pub fn token(&self, id: u32) -> Option<String> {
        self.encoder.id_to_token(id)
    }
}

/// Makes sure that the text of a special token is matched as a whole, in two cases where tokenizer.json alone would
/// break it up. transformers makes every special token that the configuration names an added token, though
/// tokenizer.json may have it in the plain vocabulary only. And old Llama files mark `</s>` as normalized: their
/// normalizer turns that into `▁</s>`, which never follows a word; transformers 5 matches it as written.
fn add_special_tokens(encoder: &mut Encoder, configs: &Configs) -> tokenizers::Result<()> {
    let added = encoder.get_added_tokens_decoder();
    let normalized = added.values().filter(|token| token.special && token.normalized).cloned();
    let plain = SPECIAL_TOKENS
        .iter()
        .filter_map(|name| configs.text(name))
        .filter(|(_, text)| encoder.token_to_id(text).is_some())
        .filter(|(_, text)| !added.values().any(|token| token.content == *text))
        .map(|(_, text)| AddedToken::from(text, true));
    let tokens: Vec<AddedToken> = normalized.map(|token| token.normalized(false)).chain(plain).collect();
    encoder.add_special_tokens(tokens).map(|_| ())
}

/// The special tokens that transformers knows by name: `bos_token`, ..
const SPECIAL_TOKENS: &[&str] = &["bos", "eos", "unk", "sep", "pad", "cls", "mask"];

/// The files of a model folder that may name special tokens, by text or by id; null where there is no such file.
struct Configs {
    texts: [(PathBuf, Value); 2],
    ids: [(PathBuf, Value); 2],
}

impl Configs {
    fn read(dir: &Path) -> Result<Self> {
        let read = |name| {
            let path = dir.join(name);
            let value = if path.exists() { read_json(&path)? } else { Value::Null };
            Ok::<_, Error>((path, value))
        };
        Ok(Self {
            texts: [read("tokenizer_config.json")?, read("special_tokens_map.json")?],
            ids: [read("config.json")?, read("generation_config.json")?],
        })
    }

    /// The text of the special token `name` and the file that gives it: a string, or `{"content": ..}` as
    /// transformers 4 wrote it.
    fn text(&self, name: &str) -> Option<(&Path, &str)> {
        self.texts.iter().find_map(|(path, config)| {
            let token = config.get(format!("{name}_token"))?;
            Some((path.as_path(), token.as_str().or_else(|| token.get("content")?.as_str())?))
        })
    }

    /// Id and text of the special token `name`, if the folder has one.
    fn special(&self, encoder: &Encoder, name: &str) -> Result<Option<(u32, String)>> {
        let Some((path, text)) = self.text(name) else { return Ok(self.special_by_id(encoder, name)) };
        match encoder.token_to_id(text) {
            Some(id) => Ok(Some((id, text.to_string()))),
            None => Err(Error::file(
                path,
                format!("{name}_token {text:?} is not in tokenizer.json; do both files belong to one model?"),
            )),
        }
    }

    /// Text by name, `{"bos_token": "<s>", ..}`: those that the folder has.
    fn special_tokens(&self, encoder: &Encoder) -> Map<String, Value> {
        let found = |name: &&str| {
            let named = self.text(name).map(|(_, text)| text.to_string());
            let text = named.or_else(|| self.special_by_id(encoder, name).map(|(_, text)| text))?;
            Some((format!("{name}_token"), Value::from(text)))
        };
        SPECIAL_TOKENS.iter().filter_map(found).collect()
    }

    fn stops(&self, eos: Option<u32>) -> Vec<u32> {
        let [_, (_, generation)] = &self.ids;
        let named = generation.get("eos_token_id");
        let several = named.and_then(Value::as_array).into_iter().flatten();
        let ids = several.chain(named).filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok());
        ids.chain(eos).collect()
    }

    /// The first id that a model configuration gives `name`. It counts only where the tokenizer agrees that the
    /// token is special: configurations are often written with their class's default ids, whatever these name.
    fn special_by_id(&self, encoder: &Encoder, name: &str) -> Option<(u32, String)> {
        let added = encoder.get_added_tokens_decoder();
        self.ids.iter().find_map(|(_, config)| {
            let value = config.get(format!("{name}_token_id"))?;
            let id = value.get(0).unwrap_or(value).as_u64().and_then(|id| u32::try_from(id).ok())?;
            let token = added.get(&id).filter(|token| token.special)?;
            Some((id, token.content.clone()))
        })
    }
}

pub(super) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|e| format!("cannot be read: {e}")).at(path)?;
    serde_json::from_slice(&text).map_err(|e| format!("invalid JSON: {e}")).at(path)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;
    use tempfile::TempDir;

    /// A BPE over single characters with the one merge `a b -> ab`; `<s>` 0, `</s>` 1 and `<pad>` 2, which is
    /// in the plain vocabulary only. With `bos`, the post-processor puts `<s>` before each text.
    pub fn toy(bos: bool) -> Value {
        let vocab = ["<s>", "</s>", "<pad>", "a", "b", "c", "d", " ", "ab", "<", "p", ">"];
        let vocab: serde_json::Map<_, _> = vocab.iter().zip(0..).map(|(t, id)| (t.to_string(), json!(id))).collect();
        let added = |id: u32, content: &str| {
            json!({"id": id, "content": content, "special": true, "normalized": false, "lstrip": false,
                   "rstrip": false, "single_word": false})
        };
        let start = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        let template = json!({"type": "TemplateProcessing", "single": [start, text], "pair": [text, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
        json!({
            "version": "1.0",
            // Stored limits that must have no effect.
            "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 2,
                        "pad_type_id": 0, "pad_token": "<pad>"},
            "added_tokens": [added(0, "<s>"), added(1, "</s>")],
            "normalizer": null,
            "pre_tokenizer": null,
            "post_processor": if bos { template } else { Value::Null },
            "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                      "merges": ["a b"]},
        })
    }

    pub fn folder(files: &[(&str, Value)]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in files {
            fs::write(dir.path().join(name), value.to_string()).unwrap();
        }
        dir
    }

    /// The toy tokenizer, with `</s>` as its EOS token or with none.
    pub fn load(bos: bool, eos: bool) -> Tokenizer {
        let config = if eos { json!({"eos_token": "</s>"}) } else { json!({}) };
        let dir = folder(&[("tokenizer.json", toy(bos)), ("tokenizer_config.json", config)]);
        Tokenizer::load(dir.path()).unwrap()
    }

    fn eos_of(files: &[(&str, Value)]) -> Option<(u32, String)> {
        let dir = folder(&[&[("tokenizer.json", toy(true))], files].concat());
        Tokenizer::load(dir.path()).unwrap().eos().map(|(id, text)| (id, text.to_string()))
    }

    #[track_caller]
    fn fails(files: &[(&str, Value)], part: &str) {
        let message = Tokenizer::load(folder(files).path()).err().expect("an error").to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }

    #[test]
    fn encodes_with_and_without_special_tokens() {
        let tokenizer = load(true, true);
        assert_eq!(tokenizer.encode("abc a").unwrap(), [0, 8, 5, 7, 3]);
        assert_eq!(tokenizer.encode("").unwrap(), [0]);
        assert_eq!(tokenizer.encode_plain("abc</s>").unwrap(), [8, 5, 1]);
        assert_eq!(load(false, true).encode("cab").unwrap(), [5, 8]);
        assert_eq!(tokenizer.decode(&[0, 8, 5, 1]).unwrap(), "abc");
        assert_eq!(tokenizer.token(8).as_deref(), Some("ab"));
    }

    #[test]
    fn pieces_are_the_text_token_by_token() {
        let tokenizer = load(true, true);
        let pieces = tokenizer.pieces(&[0, 8, 7, 5, 1]);
        let texts: Vec<(&str, bool)> = pieces.iter().map(|piece| (piece.text.as_str(), piece.special)).collect();
        assert_eq!(texts, [("<s>", true), ("ab", false), (" ", false), ("c", false), ("</s>", true)]);
        assert_eq!(tokenizer.decode_all(&[0, 8, 7, 5, 1]).unwrap(), "<s>ab c</s>");
    }

    #[test]
    fn eos_is_found_in_every_spelling_and_place() {
        let found = Some((1, "</s>".to_string()));
        let id = ("config.json", json!({"eos_token_id": 1}));
        assert_eq!(eos_of(&[("tokenizer_config.json", json!({"eos_token": "</s>"}))]), found);
        assert_eq!(eos_of(&[("tokenizer_config.json", json!({"eos_token": {"content": "</s>"}}))]), found);
        assert_eq!(eos_of(&[("special_tokens_map.json", json!({"eos_token": "</s>"}))]), found);
        assert_eq!(eos_of(&[("tokenizer_config.json", json!({"eos_token": null})), id.clone()]), found);
        assert_eq!(eos_of(&[("generation_config.json", json!({"eos_token_id": [1, 5]}))]), found);
        let start = json!({"eos_token": "<s>"});
        assert_eq!(eos_of(&[("tokenizer_config.json", start), id]), Some((0, "<s>".to_string())));
    }

    #[test]
    fn a_class_default_id_does_not_make_a_plain_token_eos() {
        assert_eq!(eos_of(&[("config.json", json!({"eos_token_id": 3}))]), None);
        assert_eq!(eos_of(&[]), None);
    }

    #[test]
    fn a_special_token_of_the_configuration_is_matched_as_a_whole() {
        let config = json!({"pad_token": "<pad>"});
        let dir = folder(&[("tokenizer.json", toy(false)), ("tokenizer_config.json", config)]);
        assert_eq!(Tokenizer::load(dir.path()).unwrap().encode("a<pad>").unwrap(), [3, 2]);
        assert_eq!(load(false, true).encode("a<pad>").unwrap(), [3, 9, 10, 3, 6, 11]);
    }

    #[test]
    fn a_special_token_marked_as_normalized_is_still_matched_after_a_word() {
        let mut llama = toy(true);
        llama["added_tokens"][1]["normalized"] = json!(true);
        llama["normalizer"] = json!({"type": "Prepend", "prepend": " "});
        let dir = folder(&[("tokenizer.json", llama), ("tokenizer_config.json", json!({"eos_token": "</s>"}))]);
        assert_eq!(Tokenizer::load(dir.path()).unwrap().encode("a</s>").unwrap(), [0, 7, 3, 1]);
    }

    #[test]
    fn broken_folders_are_named() {
        fails(&[], "tokenizer.json: cannot be read");
        fails(&[("tokenizer.json", json!({"model": 1}))], "tokenizer.json: is no tokenizer");
        let config = ("tokenizer_config.json", json!({"eos_token": "<eot>"}));
        fails(&[("tokenizer.json", toy(true)), config], "tokenizer_config.json: eos_token \"<eot>\" is not in");
        let mut random = toy(true);
        random["model"]["dropout"] = json!(0.1);
        fails(&[("tokenizer.json", random)], "BPE dropout");
        let dir = folder(&[("tokenizer.json", toy(true))]);
        fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(Tokenizer::load(dir.path()).err().unwrap().to_string().contains("config.json: invalid JSON"));
    }

    #[test]
    fn a_text_outside_the_vocabulary_is_an_error_where_the_model_says_so() {
        let mut words = toy(false);
        words["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"});
        let dir = folder(&[("tokenizer.json", words)]);
        let message = Tokenizer::load(dir.path()).unwrap().encode("b").unwrap_err().to_string();
        assert!(message.contains("tokenizer.json: cannot encode a text"), "{message}");
    }
}
