{{- /*
The pod of a server. Takes the root context and the role: `server`, or, over several nodes,
`leader` or `worker`.
*/ -}}
{{- define "expertgate.pod" -}}
{{- $root := .root -}}
{{- $role := .role -}}
{{- $worker := eq $role "worker" -}}
{{- $scheme := include "expertgate.scheme" $root | upper -}}
metadata:
  labels:
    {{- include "expertgate.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $worker | ternary "worker" "server" }}
    {{- with $root.Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # It alone is read at the start only.
    checksum/config: {{ include "expertgate.config" $root | sha256sum }}
    {{- with $root.Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- with $root.Values }}
spec:
  serviceAccountName: {{ .serviceAccount.name | default (include "expertgate.name" $root) | quote }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with .imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ quote . }}
    {{- end }}
  {{- end }}
  # The hook, then what the server takes: 30 s for streams to end, 20 for the engine, and a margin.
  terminationGracePeriodSeconds: {{ add .preStopSeconds (dig "drain_s" 30 (.config | default dict)) 25 }}
  securityContext:
    runAsNonRoot: true
    {{- with .runAsUser }}
    runAsUser: {{ int64 . }}
    runAsGroup: {{ int64 . }}
    fsGroup: {{ int64 . }}
    {{- end }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  containers:
    - name: expertgate
      image: {{ include "expertgate.image" $root }}
      imagePullPolicy: {{ .image.pullPolicy }}
      {{- if eq $role "server" }}
      args: [serve, --config, /etc/expertgate/config/expertgate.yaml]
      {{- else if eq $role "leader" }}
      command: [sh, -euc]
      args:
        - |
          ray start --head --port=6379 --include-dashboard=false
          until python -c 'import ray, sys; ray.init("auto", log_to_driver=False); sys.exit(sum(n["Alive"] for n in ray.nodes()) < int(sys.argv[1]))' "$LWS_GROUP_SIZE"; do sleep 2; done
          exec expertgate serve --config /etc/expertgate/config/expertgate.yaml
      {{- else }}
      command: [sh, -euc]
      args:
        - |
          until ray start --address="$LWS_LEADER_ADDRESS:6379" --block; do sleep 2; done
      {{- end }}
      {{- if or (ne $role "server") .model.tokenSecret .env }}
      env:
        {{- with .env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- if eq $role "leader" }}
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        {{- end }}
        {{- if ne $role "server" }}
        - {name: VLLM_PLUGINS, value: expertgate}
        - {name: VLLM_NO_USAGE_STATS, value: "1"}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        {{- end }}
        {{- with .model.tokenSecret }}
        - name: HF_TOKEN
          valueFrom: {secretKeyRef: {name: {{ quote . }}, key: HF_TOKEN}}
        {{- end }}
      {{- end }}
      {{- if not $worker }}
      ports:
        - {name: http, containerPort: 8000}
        {{- if .admin.existingSecret }}
        - {name: admin, containerPort: 9100}
        {{- end }}
      # 20 minutes, in which a model of 67 GB comes at 0.5 Gbit/s. What fails ends by itself.
      startupProbe:
        httpGet: {path: /health, port: http, scheme: {{ $scheme }}}
        periodSeconds: 5
        failureThreshold: 240
      # Red only once the engine has died, so that a slow start or a long queue restarts nothing.
      livenessProbe:
        httpGet: {path: /health, port: http, scheme: {{ $scheme }}}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      readinessProbe:
        httpGet: {path: /ready, port: http, scheme: {{ $scheme }}}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      lifecycle:
        preStop:
          sleep: {seconds: {{ .preStopSeconds }}}
      {{- end }}
      resources:
        requests:
          {{- toYaml .resources.requests | nindent 10 }}
        limits:
          {{- toYaml .resources.limits | nindent 10 }}
          {{- with .gpus }}
          nvidia.com/gpu: {{ . }}
          {{- end }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      volumeMounts:
        - {name: cache, mountPath: /home/expertgate}
        - {name: tmp, mountPath: /tmp}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- if .model.existingClaim }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if not $worker }}
        # A log belongs to one process: a pod has a volume, or of one for all a folder, of its own.
        {{- if eq $role "server" }}
        - {name: audit, mountPath: /var/lib/expertgate}
        {{- else }}
        - {name: audit, mountPath: /var/lib/expertgate, subPathExpr: $(POD_NAME)}
        {{- end }}
        # Whole folders: what is mounted by subPath never changes while the pod runs.
        - {name: config, mountPath: /etc/expertgate/config, readOnly: true}
        {{- if .apiKeys.existingSecret }}
        - {name: keys, mountPath: /etc/expertgate/keys, readOnly: true}
        {{- end }}
        - {name: policies, mountPath: /etc/expertgate/policies, readOnly: true}
        {{- if kindIs "slice" .suspended }}
        - {name: suspended, mountPath: /etc/expertgate/suspended, readOnly: true}
        {{- end }}
        {{- if .audit.signingKeySecret }}
        - {name: signing, mountPath: /etc/expertgate/signing, readOnly: true}
        {{- end }}
        {{- if .admin.existingSecret }}
        - {name: admin, mountPath: /etc/expertgate/admin, readOnly: true}
        {{- end }}
        {{- if or .catalogue.content .catalogue.existingConfigMap }}
        - {name: catalogue, mountPath: /etc/expertgate/catalogue, readOnly: true}
        {{- end }}
        {{- range .extraVolumeMounts }}
        - {{ set (deepCopy .) "readOnly" true | toJson }}
        {{- end }}
        {{- end }}
  volumes:
    - name: cache
      {{- if .cache.existingClaim }}
      persistentVolumeClaim: {claimName: {{ quote .cache.existingClaim }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ .cache.size }}}
      {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: 8Gi}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ .sharedMemory }}}
    {{- with .model.existingClaim }}
    - name: models
      persistentVolumeClaim: {claimName: {{ quote . }}, readOnly: true}
    {{- end }}
    {{- if eq $role "leader" }}
    - name: audit
      {{- if .audit.existingClaim }}
      persistentVolumeClaim: {claimName: {{ quote .audit.existingClaim }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ .audit.size }}}
      {{- end }}
    {{- end }}
    {{- if not $worker }}
    - name: config
      configMap: {name: {{ include "expertgate.name" $root }}-config}
    {{- with .apiKeys.existingSecret }}
    - name: keys
      secret: {secretName: {{ quote . }}, defaultMode: 0440}
    {{- end }}
    {{- with .audit.signingKeySecret }}
    - name: signing
      secret: {secretName: {{ quote . }}, defaultMode: 0440}
    {{- end }}
    {{- with .admin.existingSecret }}
    - name: admin
      secret: {secretName: {{ quote . }}, defaultMode: 0440}
    {{- end }}
    - name: policies
      configMap: {name: {{ .policies.existingConfigMap | default (printf "%s-policies" (include "expertgate.name" $root)) | quote }}}
    {{- if kindIs "slice" .suspended }}
    - name: suspended
      configMap: {name: {{ include "expertgate.name" $root }}-suspended}
    {{- end }}
    {{- if or .catalogue.content .catalogue.existingConfigMap }}
    - name: catalogue
      configMap: {name: {{ .catalogue.existingConfigMap | default (printf "%s-catalogue" (include "expertgate.name" $root)) | quote }}}
    {{- end }}
    {{- with .extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
  {{- with .nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .topologySpreadConstraints }}
  topologySpreadConstraints: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .priorityClassName }}
  priorityClassName: {{ quote . }}
  {{- end }}
  {{- with .runtimeClassName }}
  runtimeClassName: {{ quote . }}
  {{- end }}
{{- end }}
{{- end -}}
