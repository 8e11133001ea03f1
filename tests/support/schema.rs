//! A checker for the part of JSON Schema that our documents use.

use serde_json::Value;

/// Checks a value against the part of JSON Schema that ours uses; what is
/// wrong, with where. An unknown keyword is wrong, too: it would check nothing.
pub fn check(root: &Value, schema: &Value, value: &Value, at: &str, wrong: &mut Vec<String>) {
    let mut complain = |text: String| wrong.push(format!("{at}: {text}"));
    for (keyword, rule) in schema.as_object().expect("a schema is an object") {
        match keyword.as_str() {
            "type" => {
                let types: Vec<&Value> = rule.as_array().map_or(vec![rule], |list| list.iter().collect());
                let is = |name: &Value| match name.as_str().expect("a type's name") {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "boolean" => value.is_boolean(),
                    "null" => value.is_null(),
                    "integer" => value.is_u64() || value.is_i64(),
                    "number" => value.is_number(),
                    other => panic!("unknown type {other}"),
                };
                if !types.into_iter().any(is) {
                    complain(format!("{value} is not {rule}"));
                }
            }
            "enum" if !rule.as_array().expect("a list").contains(value) => {
                complain(format!("{value} is not of {rule}"))
            }
            "minimum" if value.as_f64() < rule.as_f64() => complain(format!("{value} is below {rule}")),
            "maximum" if value.as_f64() > rule.as_f64() => complain(format!("{value} is above {rule}")),
            "required" if value.is_object() => {
                for name in rule.as_array().expect("a list").iter().filter_map(Value::as_str) {
                    if value.get(name).is_none() {
                        complain(format!("{name} is missing"));
                    }
                }
            }
            "enum" | "minimum" | "maximum" | "required" | "title" | "description" | "$schema" | "$defs" => {}
            "properties" | "additionalProperties" | "propertyNames" | "items" | "$ref" => {}
            other => panic!("the checker does not know {other}"),
        }
    }
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        let target = root.pointer(reference.trim_start_matches('#')).expect("a reference within the schema");
        check(root, target, value, at, wrong);
    }
    if let (Some(items), Some(list)) = (schema.get("items"), value.as_array()) {
        for (index, item) in list.iter().enumerate() {
            check(root, items, item, &format!("{at}/{index}"), wrong);
        }
    }
    let Some(members) = value.as_object() else { return };
    for (name, member) in members {
        let inner = format!("{at}/{name}");
        if let Some(names) = schema.get("propertyNames") {
            check(root, names, &Value::from(name.as_str()), &inner, wrong);
        }
        match (schema.get("properties").and_then(|known| known.get(name)), schema.get("additionalProperties"))
        {
            (Some(known), _) => check(root, known, member, &inner, wrong),
            (None, Some(Value::Bool(false))) => wrong.push(format!("{inner} is not in the schema")),
            (None, Some(other)) => check(root, other, member, &inner, wrong),
            (None, None) => {}
        }
    }
}
