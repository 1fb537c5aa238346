//! A client whose failed calls are counted: [`counting`].

use http::Method;

use super::sending;
use crate::pilot_metrics::PilotMetrics;

/// The same client; what fails of its calls is in the pilot's own figures. To be called in a tokio runtime.
#[must_use]
pub fn counting(client: kube::Client, metrics: PilotMetrics) -> kube::Client {
    let namespace = client.default_namespace().to_owned();
    sending::client(&namespace, move |request| {
        let (client, metrics) = (client.clone(), metrics.clone());
        let verb = verb(request.method());
        async move {
            let answer = client.send(request).await;
            match &answer {
                Ok(response) if response.status().as_u16() >= 400 => {
                    metrics.api_error(verb, Some(response.status().as_u16()));
                }
                Ok(_) => {}
                Err(_) => metrics.api_error(verb, None),
            }
            answer
        }
    })
}

/// As the metrics of Kubernetes' own clients name it (rest_client_requests_total).
fn verb(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::stand_in::client_of;
    use crate::pilot_metrics::Now;

    #[tokio::test]
    async fn a_refusal_is_counted_and_comes_through_as_it_is() {
        let refusing = client_of(|_, _, _| {
            let status = serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "no", "reason": "Forbidden", "code": 403});
            (403, status)
        });
        let metrics = PilotMetrics::new();
        let nodes: kube::Api<k8s_openapi::api::core::v1::Node> =
            kube::Api::all(counting(refusing, metrics.clone()));
        assert!(matches!(nodes.get("n").await, Err(kube::Error::Api(status)) if status.code == 403));
        let text = metrics.render(&Now::default()).unwrap();
        assert!(text.contains(r#"jiriaf_pilot_api_errors_total{verb="GET",class="4xx"} 1"#), "{text}");
    }
}
